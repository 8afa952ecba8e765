"""Text out of a stream of token ids: whole characters only, and cut before a stop string."""

from collections.abc import Callable, Iterable, Sequence

from dsv3_jax.errors import InputError

_REPLACEMENT = "\ufffd"


class IncrementalDecoder:
    """Decodes token ids as they come; a character that lies in several tokens comes out when it is whole.

    Ids are decoded together with those before them, back to the last place but one where a text was complete:
    some decoders treat the first token of a text differently.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        """Args: decode: text of ids, U+FFFD where their bytes are not UTF-8; `Tokenizer.decode`."""
        self._decode = decode
        self._window: list[int] = []
        self._new = 0  # ids of the window that came after its last complete text
        self._given = 0  # characters of the window's text that were given out

    def feed(self, ids: Sequence[int]) -> str:
        """Takes further ids; returns the text that is now certain, maybe none."""
        self._window.extend(ids)
        self._new += len(ids)
        text = self._decode(self._window)
        # The bytes of an unfinished character at the end are one U+FFFD.
        unfinished = text.endswith(_REPLACEMENT)
        new_text = self._give(text[:-1] if unfinished else text)
        if not unfinished and self._new:
            del self._window[: -self._new]
            self._given = len(self._decode(self._window))
            self._new = 0
        return new_text

    def finish(self) -> str:
        """No more ids come: returns what was held back, U+FFFD for a character that was never finished."""
        return self._give(self._decode(self._window))

    def _give(self, text: str) -> str:
        new_text = text[self._given :]
        self._given = max(self._given, len(text))
        return new_text


class StopStrings:
    """Finds the stop string that is complete first in a text that comes in pieces.

    Attributes:
        stopped: one was found; what was given out ends before it, and nothing more is given out.
    """

    def __init__(self, strings: Iterable[str]):
        """Args: strings: stop strings; none finds nothing. Raises InputError where one is empty."""
        self._strings = tuple(strings)
        if "" in self._strings:
            raise InputError("--stop is empty; expected a text")
        self.stopped = False
        self._held = ""

    def feed(self, text: str) -> str:
        """Takes a piece of text; returns what cannot belong to a stop string any more, maybe nothing."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(s), at) for s in self._strings if (at := self._held.find(s)) >= 0]
        if found:
            _, at = min(found)
            self.stopped = True
            return self._release(at)
        return self._release(len(self._held) - self._possible_beginning())

    def finish(self) -> str:
        """Returns the text that was held back because a stop string could have begun with it."""
        return "" if self.stopped else self._release(len(self._held))

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that is the beginning of a stop string."""
        longest = max((len(s) - 1 for s in self._strings), default=0)
        ends = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in ends if any(s.startswith(self._held[-n:]) for s in self._strings)), 0)

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


class TextStream:
    """The text of one continuation while it is generated: `IncrementalDecoder`, then `StopStrings`.

    Attributes:
        token_ids: ids taken so far; where a stop string was found, the last is the one that completed it.
        text: what was given out so far.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Iterable[str] = ()):
        """Args: decode: `Tokenizer.decode`, with its options bound; stop: stop strings."""
        self._decoder = IncrementalDecoder(decode)
        self._stop = StopStrings(stop)
        self.token_ids: list[int] = []
        self.text = ""

    @property
    def stopped(self) -> bool:
        """A stop string was found; further ids are ignored."""
        return self._stop.stopped

    def feed(self, ids: Sequence[int]) -> str:
        """Takes further ids, one by one; returns the text that is now certain, maybe none."""
        before = len(self.text)
        for token_id in ids:
            if self.stopped:
                break
            self.token_ids.append(token_id)
            self.text += self._stop.feed(self._decoder.feed([token_id]))
        return self.text[before:]

    def finish(self) -> str:
        """No more ids come: returns the text that was held back."""
        before = len(self.text)
        self.text += self._stop.feed(self._decoder.finish()) + self._stop.finish()
        return self.text[before:]
