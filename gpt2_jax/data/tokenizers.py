"""Text to token ids and back: characters, bytes or GPT-2's BPE, behind one small interface, saved as JSON.

A token is an id in [0, vocab_size). All tokenizers are lossless on the text they know, and are compared by value:
two tokenizers that are equal have the same `fingerprint`.
"""

import dataclasses
import functools
import hashlib
import json
import re
from typing import ClassVar, Protocol

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from gpt2_jax.data.vocabulary import find_merges
from gpt2_jax.errors import UsageError, UserError

ENCODE_BLOCK = (
    1 << 16
)  # characters: their code points then stay in the processor's cache, three times as fast
NO_UTF8 = 'half of a surrogate pair has no UTF-8 bytes'


class Tokenizer(Protocol):
    """What the rest of the house knows of a tokenizer."""

    name: ClassVar[str]
    vocab_size: int
    byte_lengths: np.ndarray  # (V,) int64: UTF-8 bytes of each token, for bits per byte
    separator: (
        int | None
    )  # the id that stands between documents, and never arises from text; None: they are joined

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,) of the smallest unsigned dtype that fits the vocabulary; UserError where the text has no ids."""

    def cut(self, text: str) -> int:
        """The last place (0: none) where `text` may be cut, whatever stands around it, and its ids stay the same."""

    def decode_bytes(self, ids) -> bytes:
        """UTF-8 of ids (N,). For streaming: a byte tokenizer's single ids may be parts of one character."""

    def decode(self, ids) -> str:
        """Text of ids (N,), U+FFFD where the bytes are no UTF-8; UserError for an id outside the vocabulary."""


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """One token a character; its id is its place in `alphabet`, the sorted distinct characters of a text."""

    alphabet: str
    name: ClassVar[str] = 'char'
    separator: ClassVar[None] = None

    def __post_init__(self):
        if not self.alphabet:
            raise UserError(
                'the alphabet of a character tokenizer is empty: the text must hold at least one character'
            )
        if not isinstance(self.alphabet, str) or list(self.alphabet) != sorted(set(self.alphabet)):
            raise UserError(
                'the alphabet of a character tokenizer must be distinct characters in code point order'
            )

    @property
    def vocab_size(self) -> int:
        """V, the size of the alphabet."""
        return len(self.alphabet)

    @functools.cached_property
    def _codes(self) -> np.ndarray:
        """Id to code point, (V,)."""
        return np.array([ord(c) for c in self.alphabet], '<u4')

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        """Code point to id, -1 where unknown. The last entry, one past the alphabet, serves all larger code points."""
        ids = np.full(int(self._codes[-1]) + 2, -1, np.int32)
        ids[self._codes] = np.arange(self.vocab_size)
        return ids

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each character, (V,)."""
        return np.array([len(c.encode('utf-8', 'surrogatepass')) for c in self.alphabet])

    def encode(self, text: str) -> np.ndarray:
        """One id a character; UserError names the first unknown one, its position and the alphabet."""
        encoded = np.empty(len(text), np.min_scalar_type(self.vocab_size - 1))
        for start in range(0, len(text), ENCODE_BLOCK):
            codes = np.frombuffer(
                text[start : start + ENCODE_BLOCK].encode('utf-32-le', 'surrogatepass'), '<u4'
            )
            ids = self._ids.take(codes, mode='clip')
            if ids.min() < 0:
                shown = repr(self.alphabet[:100]) + (' ...' if self.vocab_size > 100 else '')
                raise _unknown(
                    text,
                    start + int(ids.argmin()),
                    f"the tokenizer's alphabet of {self.vocab_size} is {shown}",
                )
            encoded[start : start + len(ids)] = ids
        return encoded

    def cut(self, text: str) -> int:
        """Anywhere, so at the end."""
        return len(text)

    def decode_bytes(self, ids) -> bytes:
        """UTF-8 of the characters."""
        return self.decode(ids).encode('utf-8', 'replace')

    def decode(self, ids) -> str:
        """One character an id."""
        return (
            self._codes[_checked(ids, self.vocab_size)]
            .tobytes()
            .decode('utf-32-le', 'surrogatepass')
        )


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One token a byte of the text's UTF-8: knows every text, and needs no alphabet."""

    name: ClassVar[str] = 'byte'
    vocab_size: ClassVar[int] = 256
    separator: ClassVar[None] = None

    @property
    def byte_lengths(self) -> np.ndarray:
        """One each, (256,)."""
        return np.ones(self.vocab_size, np.int64)

    def encode(self, text: str) -> np.ndarray:
        """One id a byte; UserError only for text that is no Unicode, as from a damaged command line."""
        try:
            return np.frombuffer(text.encode('utf-8'), np.uint8)
        except UnicodeEncodeError as error:
            raise _unknown(text, error.start, NO_UTF8) from None

    def cut(self, text: str) -> int:
        """Anywhere, so at the end."""
        return len(text)

    def decode_bytes(self, ids) -> bytes:
        """The ids themselves."""
        return _checked(ids, self.vocab_size).astype(np.uint8).tobytes()

    def decode(self, ids) -> str:
        """The text, with U+FFFD for bytes that are no UTF-8."""
        return self.decode_bytes(ids).decode('utf-8', 'replace')


def _stand_ins() -> dict[str, int]:
    """{printable character: the byte it stands for}, in the order of GPT-2's ids: the printable bytes come first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


@dataclasses.dataclass(frozen=True)
class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding of UTF-8 bytes (GPT-2, section 2.2; Sennrich et al. 2016), computed by tiktoken.

    Text is first split by a pattern into words, numbers, runs of signs and runs of spaces, a single space going with
    what follows it. In each piece the neighbours whose merge has the lowest rank are joined, until there are none.
    Ids: the 256 bytes; then what each merge makes, by rank; the last one is <|endoftext|>.
    """

    merges: str = dataclasses.field(
        repr=False
    )  # a line 'left right' each, the first one of rank 0; bytes by stand-ins
    name: ClassVar[str] = 'gpt2'

    def __post_init__(self):
        stand_ins = _stand_ins()
        ranks = {bytes([byte]): i for i, byte in enumerate(stand_ins.values())}
        try:
            for line in self.merges.removesuffix('\n').split('\n'):
                left, right = (bytes([stand_ins[c] for c in part]) for part in line.split(' '))
                if left not in ranks or right not in ranks or left + right in ranks:
                    raise ValueError
                ranks[left + right] = len(ranks)
        except (AttributeError, KeyError, ValueError):
            raise UserError(
                f'the merges of a gpt2 tokenizer are damaged: number {len(ranks) - 256} does not join two '
                f'known tokens into a new one'
            ) from None
        object.__setattr__(self, '_ranks', ranks)

    @property
    def separator(self) -> int:
        """<|endoftext|>."""
        return len(self._ranks)

    @property
    def vocab_size(self) -> int:
        """V, 50,257 with the published merges."""
        return self.separator + 1

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        """Id to bytes."""
        return [*self._ranks, b'<|endoftext|>']

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            self.name,
            pat_str=r50k_pat_str,
            mergeable_ranks=self._ranks,
            special_tokens={'<|endoftext|>': self.separator},
            explicit_n_vocab=self.vocab_size,
        )

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of each token, (V,); <|endoftext|> is no text and has none."""
        return np.array([*map(len, self._ranks), 0])

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,); '<|endoftext|>' in a text is text like any other. UserError as for bytes."""
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError as error:
            raise _unknown(text, error.start, NO_UTF8) from None
        return ids.astype(np.min_scalar_type(self.separator))

    def cut(self, text: str) -> int:
        """Before the last whitespace that follows something visible.

        No piece of the pattern goes on from a visible character to whitespace, and what precedes the cut never ends in
        whitespace, where alone the pattern looks ahead: so both sides are split into the same pieces as before.
        """
        match = re.match(r'.*\S(?=[ \t\r\n])', text, re.DOTALL)
        return match.end() if match else 0

    def decode_bytes(self, ids) -> bytes:
        """The tokens' bytes; a token may end within a character."""
        return b''.join(map(self._bytes.__getitem__, _checked(ids, self.vocab_size).tolist()))

    def decode(self, ids) -> str:
        """The text, with U+FFFD for bytes that are no UTF-8."""
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def hub_files(self) -> dict[str, str]:
        """The tokenizer as the hub publishes it: {file name: content}."""
        stand_ins = {byte: c for c, byte in _stand_ins().items()}
        vocab = {''.join(stand_ins[byte] for byte in token): i for token, i in self._ranks.items()}
        return {
            'merges.txt': f'#version: 0.2\n{self.merges}',
            'vocab.json': json.dumps(vocab | {'<|endoftext|>': self.separator}),
        }


TOKENIZERS = {kind.name: kind for kind in (CharTokenizer, ByteTokenizer, Gpt2Tokenizer)}


def make_tokenizer(name: str, characters) -> Tokenizer:
    """The tokenizer called `name` for a text, given as itself or as the set of its characters."""
    if name not in TOKENIZERS:
        raise UsageError(f'unknown tokenizer {name!r}: expected one of {", ".join(TOKENIZERS)}')
    if name == 'char':
        return CharTokenizer(''.join(sorted(set(characters))))
    return Gpt2Tokenizer(find_merges()) if name == 'gpt2' else ByteTokenizer()


def to_json(tokenizer: Tokenizer) -> str:
    """All of a tokenizer, as text that `from_json` reads back equal."""
    return json.dumps({'name': tokenizer.name, **dataclasses.asdict(tokenizer)}, sort_keys=True)


def from_json(text: str) -> Tokenizer:
    """The tokenizer that `to_json` wrote; UserError where the text is damaged or of an unknown kind."""
    try:
        fields = json.loads(text)
        name = str(fields.pop('name'))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            'the saved tokenizer is damaged: it is not a JSON object with a "name"'
        ) from None
    if name not in TOKENIZERS:
        raise UserError(
            f'the saved tokenizer is of unknown kind {name!r}: this version reads {", ".join(TOKENIZERS)}'
        )
    try:
        return TOKENIZERS[name](**fields)
    except TypeError:
        raise UserError(
            f'the saved {name} tokenizer is damaged: it has the fields {sorted(fields)}'
        ) from None


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's JSON, in hex: what must match between tokens, checkpoint and prompt."""
    return hashlib.sha256(to_json(tokenizer).encode()).hexdigest()


def _unknown(text: str, position: int, expected: str) -> UserError:
    character = text[position]
    return UserError(
        f'unknown character {character!r} (U+{ord(character):04X}) at position {position} of the text: '
        f'{expected}'
    )


def _checked(ids, vocab_size: int) -> np.ndarray:
    """`ids` as an index array, all in [0, vocab_size)."""
    ids = np.asarray(ids).astype(np.int64)
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        at = int(outside.argmax())
        raise UserError(
            f'token {ids[at]} at position {at} is outside the vocabulary [0, {vocab_size}): '
            f'these tokens come from another tokenizer'
        )
    return ids
