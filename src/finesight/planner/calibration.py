"""Every number of the planner that was measured rather than derived, in one place.

Set them anew from `bench/results/memory.json` (`python -m bench.memory_report --errors` shows plan against measurement).
Where they were taken is said with each; "H200" is torch 2.11, CUDA 13, Qwen3-VL-8B.
"""

from __future__ import annotations

GIB = 2**30
MIB = 2**20

# Allocated between steps beyond weights, adapters and optimizer state: workspaces of the matrix library and small buffers.
# H200: 16.894 GiB at the end of a run, of which 16.330 weights, 0.163 adapters, 0.325 Adam state.
WORKSPACE_BYTES = int(0.076 * GIB)
# Taken from the GPU by the driver and the kernels of torch, outside of what torch counts as allocated.
CONTEXT_BYTES = int(0.55 * GIB)
# Reserved by torch's allocator beyond what is allocated at the peak, with expandable segments.
SLACK_SHARE = 0.04

# Packs are moved ahead: beside the one that computes, the next one of its step lies on the device.
PACKS_AHEAD = 1
# Inputs of layers that are on the device at once while the others are in host memory: one in use, one fetched ahead, one going out.
OFFLOADED_INPUTS_ON_DEVICE = 3
# Tokens that a compiled run's packs are filled up to multiples of (`models/compilation.py` STEADY_TOKENS), and segments (`data/layout.py`).
STEADY_TOKENS = 128
STEADY_SEGMENTS = 64
# Rows of logits held at once (`models/logprobs.py` CHUNK_TARGETS).
CHUNK_TARGETS = 1024
# Rows of an 8-bit vocabulary matrix dequantised at a time (`models/quantized_vocabulary.py` BLOCK_TOKENS).
VOCABULARY_BLOCK_TOKENS = 4096
# Weights brought to float32 at a time under stochastic rounding (`training/optimizer.py` ROUNDING_CHUNK_BYTES).
ROUNDING_CHUNK_BYTES = 256 * MIB
# Values rounded at random at a time (`models/rounding.py` SLICE_VALUES), and bytes of each beside them: noise, the sum with its lower half
# cut off, the size of the value (4 each), and three truth values of whether that is finite.
ROUNDING_VALUES = 2**24
ROUNDING_BYTES = 15

# Working memory of one layer's backward pass beyond what is kept of it, as multiples of a row of the MLP's width and of the hidden
# size. Counted with torch's profiler on a CPU (torch 2.13, layers of Qwen3-VL's proportions, attention replaced by a stand-in).
BACKWARD_COMPILED = (1.0, 1.5)  # everything kept
BACKWARD_SELECTIVE = (3.0, 1.5)  # activations of the MLP computed again on the way
BACKWARD_EAGER = (2.0, 1.0)
# The same of a tower block, and of its forward pass where nothing is kept.
TOWER_BACKWARD = (2.0, 1.5)
TOWER_FORWARD_COMPILED = (2.0, 2.5)
TOWER_FORWARD_EAGER_ROWS = 16  # hidden sizes: rotary embeddings are computed in float32
# FlashAttention 2 adds up the gradient of the queries in float32, over tokens rounded up by so many for each segment.
ATTENTION_ROWS_PER_SEGMENT = 128

# Speed, for ranking settings; not a promise. Needed arithmetic over the datasheet's dense bf16 rate: H200, selective, packs of 13k tokens,
# 484 of 989 TFLOP/s.
EFFICIENCY = 0.49
EFFICIENCY_EAGER = 0.38
# A float8 base against bf16, whole steps: H200, 1.28.
FLOAT8_SPEEDUP = 1.28
# Seconds that a pack costs besides its arithmetic: H200, packs of 2k tokens against packs of 13k.
PACK_OVERHEAD_S = 0.03
# Time of norms, rotations and activations computed again, as a share of the forward pass.
SELECTIVE_RECOMPUTE_SHARE = 0.05
# Bytes moved to dequantise one weight: its bits in, bf16 out, bf16 in for the product.
DEQUANTISE_BYTES = 4.6
# Bytes a second between GPU and page-locked host memory.
HOST_BANDWIDTH = 25e9
