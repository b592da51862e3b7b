"""Requests at any time, answered side by side: a prompt is computed once, its answers go on from it.

Each prompt is prefilled once; its keys and values exist once, whatever the number of answers. Rows decode together, and
a row that ends makes room for the next answer at once. On a GPU a step runs as a CUDA graph; the host reads what a step
drew while the next one runs. Rows carry settings of their own.

Requests for different adapters stand in lanes of their own, which decode in turns over one pool of keys and values:
which adapter is at work can change only between steps. What a request is answered depends on its seed and place alone,
not on what else is being answered.

Nothing here knows of threads: whoever owns an engine calls it from one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Literal, cast

import numpy as np
import torch
from torch import nn

from finesight.data.batch import PackedBatch, build_batch
from finesight.data.pack import pack_step
from finesight.data.processor import Processor
from finesight.data.sample import Sample
from finesight.errors import GrammarError, ModelError
from finesight.models.compilation import CompiledFunction
from finesight.models.decoding import BLOCK_TOKENS, Decoder, KeyValuePool
from finesight.models.packed import PackedModel
from finesight.sampling.blocks import slots_of
from finesight.sampling.drawing import Draw, draw, uniform_draws
from finesight.sampling.opening import Opening
from finesight.sampling.requests import Answer, EngineSize, Lane, Request, Token, asked_of, blocks_for
from finesight.sampling.rows import MOST_TOP_LOGPROBS, Drawn, Flight, Rows, StepKind
from finesight.sampling.text import TextStream, decode
from finesight.sampling.types import Completion

_STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
# Tokens of prompts that are computed in one pass.
PREFILL_TOKENS = 8192
# Steps before another lane has its turn: changing the adapter walks over all layers.
_STEPS_A_TURN = 8
# Requests that wait whose images are opened ahead of their turn.
_OPENED_AHEAD = 64


def stop_ids(processor: Processor) -> frozenset[int]:
    """Tokens that end an answer.

    Raises:
        ModelError: the tokenizer has none.
    """
    tokenizer = processor.tokenizer
    known = tokenizer.get_vocab()
    stops = {known[token] for token in _STOP_TOKENS if token in known} | {tokenizer.eos_token_id} - {None}
    if not stops:
        raise ModelError(
            "The tokenizer has neither <|im_end|> nor an end token: answers could not end. Use the tokenizer of the checkpoint."
        )
    return frozenset(cast("set[int]", stops))


def drawing(compiled: bool, say: Callable[[str], None]) -> Callable[..., Draw]:
    """`drawing.draw`, compiled or not; engines that share it find what the first one compiled, or that it could not be."""
    return CompiledFunction(draw, say, what="Draws") if compiled else draw


class DecodingEngine:
    """Answers requests that come at any time.

    Args:
        packed: on the device that it is to run on, in evaluation mode (see :func:`answering`) whenever `step` is called.
        forbidden: ids that are never drawn; None: those of images and videos.
        use_adapter: puts an adapter to work by its name; None: the model is used as it is, whatever requests name.
        compile_layers: compile what surrounds attention in a decoding step, and drawing.
        draw_tokens: of :func:`drawing`, where engines follow one another; None: one is made.
        say: is told if that fails.
    """

    def __init__(
        self,
        packed: PackedModel,
        processor: Processor,
        size: EngineSize,
        *,
        forbidden: Sequence[int] | None = None,
        use_adapter: Callable[[str | None], None] | None = None,
        compile_layers: bool = False,
        draw_tokens: Callable[..., Draw] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.packed, self.processor, self.size = packed, processor, size
        self.device = packed.device
        self.stop_ids = stop_ids(processor)
        self.forbidden = (processor.image_token_id, processor.video_token_id) if forbidden is None else tuple(forbidden)
        text_config = packed.base.config.text_config
        self.pool = KeyValuePool(text_config, size.blocks, packed.compute_dtype, self.device)
        self.decoder = Decoder(packed, self.pool, compile_layers=compile_layers, say=say)
        self.draw_tokens = draw_tokens or drawing(compile_layers, say)
        self._vocabulary: int = text_config.vocab_size
        self._use_adapter = use_adapter
        self._lanes: dict[str | None, Lane] = {}
        self._turn: deque[Lane] = deque()  # the first one is at work
        self._steps_left = 0
        self._in_use: Lane | None = None  # the lane whose adapter was put to work last
        self._arrivals = 0
        self._opening = Opening(processor)
        self._refused: Request | None = None  # the oldest one that the pool had no room for; later ones do not overtake it
        self._flying: tuple[Lane, Flight] | None = None
        self._captures = self.decoder.can_be_captured
        self._graphs: dict[tuple[str | None, int, StepKind], torch.cuda.CUDAGraph] = {}

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return self._flying is not None or any(lane.has_work for lane in self._lanes.values())

    @property
    def running(self) -> int:
        """Answers that are being drawn."""
        return sum(answer is not None for lane in self._lanes.values() for answer in lane.answers)

    @property
    def waiting(self) -> int:
        """Answers that have not begun."""
        return sum(len(request.waiting) for lane in self._lanes.values() for request in (*lane.waiting, *lane.begun))

    def submit(self, request: Request) -> None:
        """Takes a request; its answers begin in the order of arrival.

        Raises:
            ModelError: it is longer than the engine has room for, or asks for more alternatives than there are.
        """
        most, length = request.settings.max_completion_length, len(request.sample)
        if length + most > self.size.length_tokens or most > self.size.completion_tokens:
            raise ModelError(
                f"A prompt of {length:,} tokens and an answer of up to {most:,} are more than the {self.size.length_tokens:,} tokens "
                f"(of an answer {self.size.completion_tokens:,}) that there is room for. Lower max_completion_length, or send less."
            )
        if blocks_for(length) + request.own_blocks > self.pool.blocks - 1:
            raise ModelError(
                f"The keys and values of {length + most:,} tokens do not fit into the cache of {self.pool.blocks:,} blocks. "
                "Lower max_completion_length, or send less."
            )
        if not 0 <= request.top_logprobs <= MOST_TOP_LOGPROBS:
            raise ModelError(f"top_logprobs is {request.top_logprobs}; it must be between 0 and {MOST_TOP_LOGPROBS}.")
        request.arrival, self._arrivals = self._arrivals, self._arrivals + 1
        request.waiting.extend(range(request.settings.num_generations))
        waiting = self._lane(request.adapter).waiting
        waiting.append(request)
        if len(waiting) <= _OPENED_AHEAD:
            self._open_ahead([request])

    def cancel(self, request: Request) -> None:
        """Ends a request at once; nothing more is heard of it. One that has ended is left alone."""
        lane = self._lanes.get(request.adapter)
        if lane is None:
            return
        if request in lane.waiting:
            lane.waiting.remove(request)
        if request in lane.begun:
            lane.begun.remove(request)
            self.pool.give_back(request.blocks)
        request.waiting.clear()
        self._opening.forget(request.sample.visual_items)
        for row, answer in enumerate(lane.answers):
            if answer is not None and answer.request is request:
                self._free(lane, row)
        if self._refused is request:
            self._refused = None

    def step(self) -> None:
        """Begins what finds room, draws one more token of each row of a lane, and hands on what the step before drew."""
        lane = self._next_lane()
        launched: tuple[Lane, Flight] | None = None
        if lane is not None:
            if lane.constrained:
                self._land_flying()
            if self._use_adapter is not None and lane is not self._in_use:
                self._use_adapter(lane.adapter)
                self._in_use = lane
            self._admit(lane)
            if any(lane.answers):
                launched = lane, self._launch(lane)
        self._land_flying()
        self._flying = launched

    def finish(self) -> None:
        """Waits for the step that is under way: nothing reads the engine's memory any more."""
        if self._flying is not None:
            self._flying[1].wait()
            self._flying = None

    # Lanes

    def _lane(self, adapter: str | None) -> Lane:
        lane = self._lanes.get(adapter)
        if lane is None:
            size = self.size
            forbidden = torch.tensor(sorted(self.forbidden), device=self.device)
            blocks = blocks_for(size.length_tokens)
            rows = Rows(size.rows, blocks, size.completion_tokens, self._vocabulary, self.device, forbidden, self.draw_tokens)
            lane = self._lanes[adapter] = Lane(adapter, rows, [None] * size.rows)
            self._turn.append(lane)
        return lane

    def _next_lane(self) -> Lane | None:
        """The lane at work, or the next one with work once its turn is over."""
        if self._turn and self._steps_left > 0 and self._turn[0].has_work:
            self._steps_left -= 1
            return self._turn[0]
        for _ in range(len(self._turn)):
            self._turn.rotate(-1)
            if self._turn[0].has_work:
                self._steps_left = _STEPS_A_TURN - 1
                return self._turn[0]
        return None

    # Admission

    def _admit(self, lane: Lane) -> None:
        """Gives free rows to waiting answers, prefilling prompts as room allows."""
        while True:
            begun: list[int] = []
            while lane.free_row() is not None:
                if not lane.begun:
                    requests = self._next_requests(lane)
                    if not requests:
                        break
                    self._prefill(requests)
                    lane.begun.extend(requests)
                if (row := self._begin(lane, lane.begun[0])) is None:
                    break
                begun.append(row)
                if not lane.begun[0].waiting:
                    self.pool.give_back(lane.begun.popleft().blocks)
            # An answer may end with its first token, which makes room for another.
            if not begun or not self._draw_first(lane, begun):
                return

    def _next_requests(self, lane: Lane) -> list[Request]:
        """Requests whose answers find rows now, as many as one pass and the pool take, their blocks taken.

        Each prompt that is computed keeps room for one answer, in whichever lane, so that one can always begin.
        """
        requests: list[Request] = []
        tokens, rows = 0, sum(answer is None for answer in lane.answers)
        reserved = sum(request.own_blocks for other in self._lanes.values() for request in other.begun)
        while lane.waiting and rows > 0:
            request = lane.waiting[0]
            length = len(request.sample)
            if self._refused is not None and self._refused.arrival < request.arrival:
                break
            if blocks_for(length) + request.own_blocks + reserved > self.pool.free_blocks:
                self._refused = request
                break
            if requests and tokens + length > PREFILL_TOKENS:
                break
            if self._refused is request:
                self._refused = None
            request.blocks = self.pool.take(blocks_for(length))
            reserved += request.own_blocks
            requests.append(lane.waiting.popleft())
            tokens, rows = tokens + length, rows - len(request.waiting)
        return requests

    def _prefill(self, requests: Sequence[Request]) -> None:
        batch, order = self._batch([request.sample for request in requests])
        self._open_ahead(islice((request for lane in self._turn for request in lane.waiting), _OPENED_AHEAD))
        slots = np.concatenate([slots_of(requests[index].blocks, len(requests[index].sample)) for index in order])
        logits = self.decoder.prefill(batch, torch.from_numpy(slots).to(self.device, non_blocking=True))
        for index, row in zip(order, logits, strict=True):
            requests[index].logits = row

    def _batch(self, samples: Sequence[Sample]) -> tuple[PackedBatch, list[int]]:
        """Prompts laid end to end, each to give what follows its last token; and their order in it."""
        total = sum(len(sample) for sample in samples)
        (plan,) = pack_step(samples, token_budget=total, share=False)
        cache = self.packed.feature_cache
        items = {item.key: item for sample in samples for item in sample.visual_items}
        stored = self._kept(items)
        patches = self._opening.take(item for key, item in items.items() if key not in stored)
        batch = build_batch(
            plan,
            lambda item: patches[item.key],
            self.processor.layout.merge_size,
            tower=self.packed.tower_shape,
            stored=stored,
        )
        order = [tree.segments[0].samples[0] for tree in plan.trees]
        ends = np.cumsum([len(plan.samples[index]) for index in order]) - 1
        batch = replace(batch, predict_from=torch.from_numpy(ends.astype(np.int64)))
        if cache is not None:
            batch = cache.prefetch(batch, self.device).result()
        return batch.to(self.device), order

    def _kept(self, keys: Iterable[str]) -> frozenset[str]:
        """Images and videos whose features are kept, so that nobody needs their pixels."""
        cache = self.packed.feature_cache
        return frozenset() if cache is None else frozenset(cache.known(dict.fromkeys(keys)))

    def _open_ahead(self, requests: Iterable[Request]) -> None:
        """Starts opening the images of requests that wait."""
        for request in requests:
            items = request.sample.visual_items
            stored = self._kept(item.key for item in items)
            self._opening.begin(item for item in items if item.key not in stored)

    def _begin(self, lane: Lane, request: Request) -> int | None:
        """A free row for the next answer of a request; None if the pool has no room for it."""
        row = cast(int, lane.free_row())
        if request.own_blocks > self.pool.free_blocks:
            return None
        sample, settings = request.sample, request.settings
        whole = len(sample) // BLOCK_TOKENS  # full blocks of the prompt, shared; the rest of it is copied
        blocks = self.pool.take(request.own_blocks)
        self.pool.share(request.blocks[:whole])
        if len(sample) % BLOCK_TOKENS:
            self.pool.copy_block(request.blocks[whole], blocks[0])
        stream = TextStream(self.processor.tokenizer, settings.stop) if settings.stop else None
        number = request.waiting.popleft()
        constraint = None if request.grammar is None else request.grammar.begin()
        kind = StepKind.of(settings, request.top_logprobs, constrained=constraint is not None)
        answer = Answer(request, number, [*request.blocks[:whole], *blocks], kind, stream, constraint)
        uniform = uniform_draws(settings.seed, request.place, number, settings.max_completion_length)
        lane.answers[row] = answer
        lane.rows.fill(row, sample.token_ids, sample.next_position, answer.blocks, settings, uniform)
        lane.rows.allow(row, None if constraint is None else constraint.allowed())
        return row

    def _draw_first(self, lane: Lane, begun: list[int]) -> bool:
        """The first tokens of answers that have just begun; whether one of them ended with it."""
        answers = [cast(Answer, lane.answers[row]) for row in begun]
        logits = torch.stack([cast(torch.Tensor, answer.request.logits) for answer in answers])
        kind = asked_of(answers)
        lane.rows.draw_first(begun, logits, kind)
        drawn = Flight.of(lane.rows, [], kind).wait()
        # A request that fails takes its other answers with it.
        ended = [lane.answers[row] is not answer or self._take(lane, row, drawn) for row, answer in zip(begun, answers, strict=True)]
        return any(ended)

    # Decoding

    def _launch(self, lane: Lane) -> Flight:
        """One step of every row of a lane, started."""
        last = max(row for row, answer in enumerate(lane.answers) if answer is not None)
        kind = asked_of([answer for answer in lane.answers if answer is not None])
        if self._captures:
            self._run_graph(lane, min(len(lane.answers), 1 << last.bit_length()), kind)
        else:
            lane.rows.step(self.decoder, last + 1, kind)
        return Flight.of(lane.rows, list(lane.answers), kind)

    def _run_graph(self, lane: Lane, count: int, kind: StepKind) -> None:
        """The step as a CUDA graph, captured when a number of rows is first met; the lane's adapter is part of it."""
        graph = self._graphs.get((lane.adapter, count, kind))
        if graph is None:
            with lane.rows.restored():
                side = torch.cuda.Stream(self.device)
                side.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(side):  # kernels are compiled and workspaces made before capture
                    for _ in range(2):
                        lane.rows.step(self.decoder, count, kind)
                torch.cuda.current_stream(self.device).wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                pool = next(iter(self._graphs.values())).pool() if self._graphs else None
                with torch.cuda.graph(graph, pool=pool):
                    lane.rows.step(self.decoder, count, kind)
            self._graphs[lane.adapter, count, kind] = graph
        graph.replay()

    def _land_flying(self) -> None:
        """Takes what the step that is under way drew; rows that ended are free from here on."""
        if self._flying is None:
            return
        (lane, flight), self._flying = self._flying, None
        drawn = flight.wait()
        for row, answer in enumerate(flight.answers):
            if answer is not None and lane.answers[row] is answer:
                self._take(lane, row, drawn)

    def _take(self, lane: Lane, row: int, drawn: Drawn) -> bool:
        """Adds the token of a row to its answer; True, and the row free, if that ends it."""
        answer = cast(Answer, lane.answers[row])
        request, settings = answer.request, answer.request.settings
        token, logprob = drawn.tokens[row], drawn.logprobs[row]
        answer.tokens.append(token)
        answer.logprobs.append(logprob)
        ended = token in self.stop_ids
        if answer.stream is not None and not ended:
            answer.text += answer.stream.add(token)
        cut = answer.stream is not None and answer.stream.stopped
        completion: Completion | None = None
        if ended or cut or len(answer.tokens) >= settings.max_completion_length:
            reason: Literal["stop", "length"] = "stop" if ended or cut else "length"
            text = answer.text if cut else decode(self.processor.tokenizer, answer.tokens[:-1] if ended else answer.tokens)
            completion = Completion(text, tuple(answer.tokens), reason, tuple(answer.logprobs))
            self._free(lane, row)
        if request.on_token is not None:
            request.on_token(answer.number, Token(token, logprob, drawn.alternatives(row, request.top_logprobs)))
        if completion is not None and request.on_end is not None:
            request.on_end(answer.number, completion)
        return completion is not None or not self._constrain(lane, row, token)

    def _constrain(self, lane: Lane, row: int, token: int) -> bool:
        """Goes on in the grammar of a row, if it has one; False, and the request gone, if that cannot be done."""
        answer = cast(Answer, lane.answers[row])
        if answer.constraint is None:
            return True
        try:
            answer.constraint.take(token)
            lane.rows.allow(row, answer.constraint.allowed())
        except GrammarError as error:
            self.cancel(answer.request)
            if answer.request.on_error is None:
                raise
            answer.request.on_error(error)
            return False
        return True

    def _free(self, lane: Lane, row: int) -> None:
        answer = cast(Answer, lane.answers[row])
        lane.answers[row] = None
        self.pool.give_back(answer.blocks)
        lane.rows.clear(row)


@contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training mode, module by module, is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
