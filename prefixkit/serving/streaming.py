"""Text out of tokens as they come: never half a character, and together exactly what decoding all of them gives."""

from __future__ import annotations

from prefixkit.task import ModelTokenizer

_BROKEN = "\ufffd"


class TextStream:
    """The text of one row, without white space at either end.

    Tokens are pieces of bytes, and a tokenizer may write a token differently after another. So each piece of text is
    the difference between decoding a window of tokens with and without the newest, and it is held back while it ends
    in a broken character or in white space.
    """

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.window, self.read = 0, 0
        self.spaces, self.started = "", False

    def push(self, token: int) -> str:
        """Append a token and return the text that is certain by now, often one token's, sometimes none."""
        self.ids.append(token)
        return self._certain(final=False)

    def finish(self) -> str:
        """Return what was held back; white space at the end is dropped, a character that stayed broken is not."""
        return self._certain(final=True)

    def _certain(self, *, final: bool) -> str:
        known = self.tokenizer.decode(self.ids[self.window : self.read])
        text = self.tokenizer.decode(self.ids[self.window :])
        if len(text) <= len(known) or (text.endswith(_BROKEN) and not final):
            return ""
        self.window, self.read = self.read, len(self.ids)
        return self._without_outer_spaces(text[len(known) :])

    def _without_outer_spaces(self, text: str) -> str:
        text = self.spaces + text if self.started else text.lstrip()
        kept = text.rstrip()
        self.started = self.started or bool(kept)
        self.spaces = text[len(kept) :]
        return kept if kept or not self.started else ""
