"""Measurements: our training and that of others, on the same samples, with the same supervised tokens, on one machine.

Run from the root of the checkout, for example `python -m bench.claims.chart_bf16 --help`; see bench/README.md.
"""
