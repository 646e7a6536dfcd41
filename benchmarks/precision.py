"""Error of bfloat16 and float16 on what the published code computed, against float32.

Writes benchmarks/precision.md. Run as `PYTHONPATH=tests python benchmarks/precision.py`, with the folder of
the recorded rollouts in GENSTREAM_PARITY_DIR.
"""

from pathlib import Path

from rollouts import DTYPES, error_shares, every_case

_PAGE = Path(__file__).with_suffix(".md")
_HEAD = """# Rounding

Root mean square error of the latents of whole rollouts, and of single steps of Wan, as a share of their root
mean square, against float32 on the CPU. Noise, prompts and weights are those of recorded runs of published
code, whose models are tiny and have random weights: a trained model may round better or worse. Made by
`benchmarks/precision.py`.

| set | scenario | latent frames | bfloat16 | float16 |
|---|---|---|---|---|
"""


def main() -> None:
    """Run all rollouts and write the page."""
    rows = []
    for case in every_case():
        shares = " | ".join(f"{100 * share:.2f} %" for share in error_shares(case, DTYPES))
        rows.append(f"| {case.set_name} | {case.name} | {case.expected.shape[2]} | {shares} |\n")
    _PAGE.write_text(_HEAD + "".join(rows))


if __name__ == "__main__":
    main()
