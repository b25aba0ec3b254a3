"""Text out of tokens as they come: never half a character, and together what decoding all of them gives."""

from __future__ import annotations

from prefixkit.task import ModelTokenizer

_BROKEN = "\ufffd"


class TextStream:
    """The text of one row.

    Tokens are pieces of bytes, and a tokenizer may write a token differently after another. So each piece of text is
    the difference between decoding a window of tokens with and without the newest, and it is held back while it ends
    in a broken character.
    """

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.window, self.read = 0, 0

    def push(self, token: int) -> str:
        """Append a token and return the text that is certain by now, often one token's, sometimes none."""
        self.ids.append(token)
        return self._certain(final=False)

    def finish(self) -> str:
        """Return what was held back, a character that stayed broken."""
        return self._certain(final=True)

    def _certain(self, *, final: bool) -> str:
        known = self.tokenizer.decode(self.ids[self.window : self.read])
        text = self.tokenizer.decode(self.ids[self.window :])
        if len(text) <= len(known) or (text.endswith(_BROKEN) and not final):
            return ""
        self.window, self.read = self.read, len(self.ids)
        return text[len(known) :]


class Trimmed:
    """A text that comes in pieces, without white space at either end: some is held back until more text follows."""

    def __init__(self) -> None:
        self.spaces, self.started = "", False

    def push(self, text: str) -> str:
        """More text; gives what is certain by now."""
        text = self.spaces + text if self.started else text.lstrip()
        kept = text.rstrip()
        self.started = self.started or bool(kept)
        self.spaces = text[len(kept) :]
        return kept if kept or not self.started else ""
