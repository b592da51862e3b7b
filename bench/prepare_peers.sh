#!/usr/bin/env bash
# Packs what a GPU machine without a network needs beside torch and transformers to run the peers, and servers:
#   bench/prepare_peers.sh OUT_DIR
# writes OUT_DIR/peers.tar.xz (Unsloth, TRL, what `transformers serve` and our server need, and what they stand on, about 20 MB) and OUT_DIR/qwen.tiktoken (the vocabulary of
# the Qwen models, from the dashscope package). Neither is committed. The claims take both with --peers and --bpe.
# Target: Python 3.12, Linux x86-64, CUDA 13. Works beside torch 2.11 and transformers 5.17 (seen 2026-11-20).
set -euo pipefail
if [ $# -ne 1 ]; then
  echo "usage: $0 OUT_DIR" >&2
  exit 2
fi
python=${PYTHON:-python3}
mkdir -p "$1"
out=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

platforms=()
for version in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${version}_x86_64")
done
"$python" -m pip install -q --target "$work/site" --no-compile --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp "${platforms[@]}" \
  unsloth==2026.10.9 unsloth_zoo==2026.10.9 trl==1.15.0 datasets==4.8.0 bitsandbytes==0.50.2 liger-kernel==0.8.5 peft==0.21.2 \
  cut-cross-entropy qwen-vl-utils tyro hf_transfer msgspec json5 structlog nest-asyncio docstring-parser shtab multiprocess dill \
  torchao diffusers accelerate pydantic pydantic-core annotated-types typing-inspection \
  fastapi==0.165.0 starlette==1.10.0 uvicorn==0.54.0 opentelemetry-api==1.45.2 openai==2.47.0 jiter distro sniffio
# Parts for other hardware, and an editor: most of the size, never used.
rm -rf "$work/site/studio" "$work/site/bin" "$work"/site/bitsandbytes/libbitsandbytes_{rocm*,xpu*,cuda11*,cuda12*,cuda132*}.so
tar -C "$work/site" -cJf "$out/peers.tar.xz" .

"$python" -m pip download -q --no-deps --only-binary=:all: -d "$work" dashscope==2.0.2
"$python" -c 'import sys, zipfile; sys.stdout.buffer.write(zipfile.ZipFile(sys.argv[1]).read("dashscope/resources/qwen.tiktoken"))' \
  "$work"/dashscope-*.whl > "$out/qwen.tiktoken"
ls -la "$out/peers.tar.xz" "$out/qwen.tiktoken"
