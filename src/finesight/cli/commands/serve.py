"""Arguments of `finesight serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from finesight.cli.flags import errors_in_flags
from finesight.cli.options import ModelOption, PixelLimits, Precision


def serve(
    *,
    model: ModelOption = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Adapter or run, as folder or NAME=folder; may be given several times.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the base.", show_default="its folder or name on the hub")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: every one of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="FINESIGHT_API_KEY", help="What clients must present.", show_default="none is asked for")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Answers drawn side by side, for each model.")] = 16,
    max_length_tokens: Annotated[int, typer.Option(help="Most tokens of a prompt and its answer, images included.")] = 8192,
    max_completion_length: Annotated[int, typer.Option(help="Tokens of an answer where the request says nothing.")] = 1024,
    queue_size: Annotated[int, typer.Option(help="Requests held beyond those that are being answered; then 429.")] = 128,
    max_body_mib: Annotated[int, typer.Option(help="Largest body of a request, in MiB; then 413.")] = 32,
    timeout_s: Annotated[float, typer.Option(help="Longest time that a request takes, in seconds; then 408.")] = 300.0,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch media from public http(s) addresses that requests name.")] = False,
    media_dir: Annotated[list[Path] | None, typer.Option(help="Folder that requests may name files in.", show_default="none")] = None,
    adapter_dir: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder that clients may load adapters from while it serves, as a run that samples here does.", show_default="none"
        ),
    ] = None,
    engine: Annotated[
        Literal["finesight", "vllm", "sglang"],
        typer.Option(help="What answers: finesight (this project's own server), or vllm or sglang, if installed.", metavar="<engine>"),
    ] = "finesight",
    print_only: Annotated[bool, typer.Option("--print", help="With another engine: print its command, start nothing.")] = False,
    tensor_parallel_size: Annotated[int, typer.Option(help="With another engine: GPUs that share the model.")] = 1,
    images_per_prompt: Annotated[int | None, typer.Option(min=0, help="With another engine: most images of a request.")] = None,
    pixels: PixelLimits,
    precision: Precision,
) -> None:
    """Serve a base and adapters on it over OpenAI's interface (/v1/chat/completions); needs the extra `serve`.

    Ctrl-C (or SIGTERM) takes no more requests and answers those that are held.
    """
    from finesight.cli.serve import serve_models
    from finesight.cli.serve_engine import hand_over
    from finesight.data_settings import DataSettings
    from finesight.serve.settings import ServeSettings

    limits = ServeSettings(
        host=host,
        port=port,
        api_key=api_key,
        batch_size=batch_size,
        max_length_tokens=max_length_tokens,
        max_completion_length=max_completion_length,
        queue_size=queue_size,
        max_body_bytes=max_body_mib * 2**20,
        timeout_s=timeout_s,
        allow_urls=allow_urls,
        allowed_dirs=tuple(media_dir or ()),
        adapter_dirs=tuple(adapter_dir or ()),
    )
    data = DataSettings(**pixels.given())
    with errors_in_flags():
        if engine != "finesight":
            hand_over(
                engine,
                model,
                adapter or [],
                limits,
                name=name,
                data=data,
                tensor_parallel_size=tensor_parallel_size,
                images_per_prompt=images_per_prompt,
                print_only=print_only,
                console=Console(stderr=True),
                **precision.settings(),
            )
            return
        if print_only or tensor_parallel_size != 1 or images_per_prompt is not None:
            raise typer.BadParameter(
                "goes with --engine vllm or sglang alone", param_hint="--print, --tensor-parallel-size, --images-per-prompt"
            )
        serve_models(model, adapter or [], limits, name=name, data=data, console=Console(stderr=True), **precision.settings())
