"""What the quickstart needs and the network might not give: a small pretrained backbone and a sample of E2E.

Both folders hold a CARD.md with source and licence.
"""

from pathlib import Path

BACKBONE = Path(__file__).parent / "gpt2-8m"
"""A GPT-2 of 8.5 million parameters, pretrained on public-domain text. CC0."""

E2E = Path(__file__).parent / "e2e"
"""Restaurant records and sentences that state them: train, valid, test. CC BY-SA 4.0."""
