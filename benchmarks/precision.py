"""Error of bfloat16 and float16 on rollouts of the published students' code, against float32.

Writes benchmarks/precision.md. Run as `PYTHONPATH=tests python benchmarks/precision.py`, with the folder of
the recorded rollouts in GENSTREAM_PARITY_DIR.
"""

from pathlib import Path

from rollouts import DTYPES, error_shares, rollouts

_PAGE = Path(__file__).with_suffix(".md")
_HEAD = """# Rounding

Root mean square error of the latents of whole rollouts, as a share of their root mean square, against float32
on the CPU. Noise, prompts and weights are those of recorded rollouts of the published code, whose models are
tiny and have random weights: a trained model may round better or worse. Made by `benchmarks/precision.py`.

| set | scenario | latent frames | bfloat16 | float16 |
|---|---|---|---|---|
"""


def main() -> None:
    """Run all rollouts and write the page."""
    rows = []
    for rollout in rollouts("self_forcing", "longlive"):
        shares = " | ".join(f"{100 * share:.2f} %" for share in error_shares(rollout, DTYPES))
        rows.append(f"| {rollout.set_name} | {rollout.name} | {rollout.expected.shape[2]} | {shares} |\n")
    _PAGE.write_text(_HEAD + "".join(rows))


if __name__ == "__main__":
    main()
