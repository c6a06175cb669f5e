"""Text to token ids and back: characters, bytes or GPT-2's BPE, behind one interface.

A token is an id in [0, vocab_size). Every tokenizer is lossless on the text it can encode.
Tokenizers are compared by value: equal ones have the same `fingerprint`.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from typing import ClassVar, Protocol

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from gpt2_jax import foreign
from gpt2_jax.data.vocabulary import find_merges
from gpt2_jax.errors import UsageError, UserError

# Characters encoded at a time. Their code points stay in the processor's cache: 3 times as fast.
ENCODE_BLOCK = 1 << 16
END_OF_TEXT = '<|endoftext|>'
# Whitespace as Unicode and tiktoken define it: \s in Python has four control characters more.
BLANKS = r'[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]'
LONG_BLANKS = re.compile(BLANKS + '{1000,}')
NOT_UTF8 = 'half of a surrogate pair has no UTF-8 bytes'


class Tokenizer(Protocol):
    """The interface of every tokenizer, and what most of them share.

    `byte_lengths` (V,) int64 is the number of UTF-8 bytes of each token, for bits per byte.
    `separator` is the id between two documents, which no text produces; None if it has none.
    """

    name: ClassVar[str]
    vocab_size: int
    byte_lengths: np.ndarray
    separator: int | None = None

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,), of the smallest unsigned dtype that fits the vocabulary.

        Raises UserError if a character has no id.
        """

    def cut(self, text: str) -> int:
        """The last position at which `text` may be cut without changing its ids.

        0 if there is none; here any will do. The text before `text`, or after it, does not matter.
        """
        return len(text)

    def decode_bytes(self, ids) -> bytes:
        """UTF-8 of ids (N,). The bytes may end inside a character: streaming must buffer them."""

    def hub_files(self) -> dict[str, str]:
        """{file name: content} of the tokenizer as transformers reads it."""

    def decode(self, ids) -> str:
        """Text of ids (N,), with U+FFFD for bytes that are not UTF-8.

        Raises UserError for an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode('utf-8', 'replace')


@dataclasses.dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """One token a character. Its id is its index in `alphabet`, the sorted distinct characters."""

    alphabet: str
    name: ClassVar[str] = 'char'

    def __post_init__(self):
        if not self.alphabet:
            raise UserError(
                'the alphabet of a character tokenizer is empty: the text must hold at least one '
                'character'
            )
        if not isinstance(self.alphabet, str) or list(self.alphabet) != sorted(set(self.alphabet)):
            raise UserError(
                'the alphabet of a character tokenizer must be distinct characters in the order of '
                'their code points'
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
        """Code point to id; -1 if unknown. The last entry stands for all larger code points."""
        ids = np.full(int(self._codes[-1]) + 2, -1, np.int32)
        ids[self._codes] = np.arange(self.vocab_size)
        return ids

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each character, (V,)."""
        return np.array([len(c.encode('utf-8', 'surrogatepass')) for c in self.alphabet])

    def encode(self, text: str) -> np.ndarray:
        """One id a character. UserError names the first unknown one and its position."""
        _check_text(text)
        encoded = np.empty(len(text), np.min_scalar_type(self.vocab_size - 1))
        for start in range(0, len(text), ENCODE_BLOCK):
            block = text[start : start + ENCODE_BLOCK]
            codes = np.frombuffer(block.encode('utf-32-le', 'surrogatepass'), '<u4')
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

    def decode_bytes(self, ids) -> bytes:
        """The characters as UTF-8."""
        return self.decode(ids).encode('utf-8', 'replace')

    def decode(self, ids) -> str:
        """One character an id."""
        codes = self._codes[_checked(ids, self.vocab_size)]
        return codes.tobytes().decode('utf-32-le', 'surrogatepass')

    def hub_files(self) -> dict[str, str]:
        """The tokenizer in the form of transformers: one word a character, and no unknown one.

        The name of the unknown token is not in the vocabulary, so that a character without an id
        is an error there too.
        """
        each_character = {'type': 'Split', 'behavior': 'Isolated', 'invert': False}
        each_character['pattern'] = {'Regex': r'[\s\S]'}
        vocab = {character: i for i, character in enumerate(self.alphabet)}
        return _hub_tokenizer(
            pre_tokenizer=each_character,
            decoder={'type': 'Fuse'},
            model={'type': 'WordLevel', 'vocab': vocab, 'unk_token': '<unknown>'},
        )


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """One token a byte of the text's UTF-8: encodes every text, and needs no alphabet."""

    name: ClassVar[str] = 'byte'
    vocab_size: ClassVar[int] = 256

    @property
    def byte_lengths(self) -> np.ndarray:
        """All 1, (256,)."""
        return np.ones(self.vocab_size, np.int64)

    def encode(self, text: str) -> np.ndarray:
        """One id a byte. Raises UserError only for half of a surrogate pair."""
        _check_text(text)
        try:
            return np.frombuffer(text.encode('utf-8'), np.uint8)
        except UnicodeEncodeError as error:
            raise _unknown(text, error.start, NOT_UTF8) from None

    def decode_bytes(self, ids) -> bytes:
        """The ids themselves."""
        return _checked(ids, self.vocab_size).astype(np.uint8).tobytes()

    def hub_files(self) -> dict[str, str]:
        """The tokenizer in the form of transformers: GPT-2's bytes, without merges."""
        bytes_alone = {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': False}
        bytes_alone |= {'trim_offsets': True}
        return _hub_tokenizer(
            pre_tokenizer=bytes_alone,
            decoder=bytes_alone,
            model={'type': 'BPE', 'vocab': _stand_ins(), 'merges': []},
        )


def _hub_tokenizer(**parts) -> dict[str, str]:
    """{'tokenizer.json': ..}, as the library tokenizers reads it."""
    absent = dict.fromkeys(('truncation', 'padding', 'normalizer', 'post_processor'))
    content = {'version': '1.0', 'added_tokens': [], **absent, **parts}
    return {'tokenizer.json': json.dumps(content)}


def _stand_ins() -> dict[str, int]:
    """{printable character: the byte it stands for}, in the order of GPT-2's ids.

    The printable bytes come first. Source: bytes_to_unicode in OpenAI's encoder.py of GPT-2.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


@dataclasses.dataclass(frozen=True)
class Gpt2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding of UTF-8 bytes, computed by tiktoken.

    Radford et al. 2019, section 2.2; Sennrich et al. 2016. A pattern first splits the text into
    words, numbers, runs of signs and runs of whitespace; a single space belongs to the word after
    it. In each piece the adjacent pair whose merge has the lowest rank is joined, until no pair
    has a merge.

    Ids: first the 256 bytes, then the result of each merge by rank, last <|endoftext|>. `merges`
    has one line 'left right' for each merge, rank 0 first, with a printable character for each
    byte.
    """

    merges: str = dataclasses.field(repr=False)
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
                f'the merges of a gpt2 tokenizer are damaged: number {len(ranks) - 256} does not '
                f'join two known tokens into a new one'
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
        return [*self._ranks, END_OF_TEXT.encode()]

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            self.name,
            pat_str=r50k_pat_str,
            mergeable_ranks=self._ranks,
            special_tokens={END_OF_TEXT: self.separator},
            explicit_n_vocab=self.vocab_size,
        )

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of each token, (V,); 0 for <|endoftext|>, which stands for no text."""
        return np.array([*map(len, self._ranks), 0])

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,). The characters '<|endoftext|>' are encoded as ordinary text.

        Raises UserError only for half of a surrogate pair.
        """
        _check_text(text)
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError as error:
            raise _unknown(text, error.start, NOT_UTF8) from None
        except ValueError:
            ids = self._encode_blanks_apart(text)
        return ids.astype(np.min_scalar_type(self.separator))

    def _encode_blanks_apart(self, text: str) -> np.ndarray:
        """The ids of a text with runs of whitespace that tiktoken's pattern cannot split.

        tiktoken gives up on a million blanks before a visible character. The pattern makes one
        piece of such a run without its last character. tiktoken can encode this piece alone,
        because no visible character follows it, and the ids are the same.
        """
        pieces, start = [], 0
        for run in LONG_BLANKS.finditer(text):
            if run.end() < len(text):
                pieces += [text[start : run.start()], text[run.start() : run.end() - 1]]
                start = run.end() - 1
        with foreign.parsing('the text', 'GPT-2 tokens'):
            ids = [
                self._encoding.encode_to_numpy(piece, disallowed_special=())
                for piece in [*pieces, text[start:]]
            ]
            return np.concatenate(ids)

    def cut(self, text: str) -> int:
        """Before the last whitespace that follows a visible character.

        No piece of the pattern continues from a visible character into whitespace. The pattern
        looks ahead only in whitespace, and the text before the cut does not end in whitespace. So
        each side is split into the same pieces as in the whole text.
        """
        match = re.match(r'.*\S(?=[ \t\r\n])', text, re.DOTALL)
        return match.end() if match else 0

    def decode_bytes(self, ids) -> bytes:
        """The tokens' bytes; a token may end inside a character."""
        return b''.join(map(self._bytes.__getitem__, _checked(ids, self.vocab_size).tolist()))

    def hub_files(self) -> dict[str, str]:
        """The tokenizer in the form of the hub."""
        stand_ins = {byte: c for c, byte in _stand_ins().items()}
        vocab = {''.join(stand_ins[byte] for byte in token): i for token, i in self._ranks.items()}
        return {
            'merges.txt': f'#version: 0.2\n{self.merges}',
            'vocab.json': json.dumps(vocab | {END_OF_TEXT: self.separator}),
        }


TOKENIZERS = {kind.name: kind for kind in (CharTokenizer, ByteTokenizer, Gpt2Tokenizer)}


def make_tokenizer(name: str, characters) -> Tokenizer:
    """The tokenizer called `name`, for a text with these characters.

    They may be in any order, and repeated. Raises UsageError for an unknown name, and UserError if
    GPT-2's vocabulary cannot be found.
    """
    if name not in TOKENIZERS:
        raise UsageError(f'unknown tokenizer {name!r}: expected one of {", ".join(TOKENIZERS)}')
    if name == 'char':
        return CharTokenizer(''.join(sorted(set(characters))))
    return Gpt2Tokenizer(find_merges()) if name == 'gpt2' else ByteTokenizer()


def encode_special(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids (N,) of a text in which each '<|endoftext|>' is the separator, and not ordinary text.

    A tokenizer without a separator encodes it as ordinary text. Raises UserError as `encode` does.
    """
    if tokenizer.separator is None or END_OF_TEXT not in text:
        return tokenizer.encode(text)
    first, *others = (tokenizer.encode(part) for part in text.split(END_OF_TEXT))
    separator = np.array([tokenizer.separator], first.dtype)
    return np.concatenate([first, *(array for part in others for array in (separator, part))])


def to_json(tokenizer: Tokenizer) -> str:
    """The whole tokenizer as JSON; `from_json` reads it back equal."""
    return json.dumps({'name': tokenizer.name, **dataclasses.asdict(tokenizer)}, sort_keys=True)


def from_json(text: str, source: str | os.PathLike = 'the saved tokenizer') -> Tokenizer:
    """The tokenizer that `to_json` wrote. Raises UserError for damaged text or an unknown kind."""
    remedy = f'this version reads {", ".join(TOKENIZERS)}'
    fields = foreign.parse_json(text, source, {'name': str})
    name = fields.pop('name')
    if name not in TOKENIZERS:
        raise foreign.error(source, f'is of unknown kind {foreign.show(name)}', remedy)
    kind = TOKENIZERS[name]
    schema = {field.name: str for field in dataclasses.fields(kind)}
    foreign.check(fields, schema, source)
    if extra := fields.keys() - schema.keys():
        raise foreign.error(source, f'is damaged: {name} has no field {foreign.show(min(extra))}')
    try:
        return kind(**fields)
    except UserError as error:
        raise foreign.error(source, f'is damaged: {error}') from None


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's JSON, in hex: tokens and checkpoints must agree on it."""
    return hashlib.sha256(to_json(tokenizer).encode()).hexdigest()


def _check_text(text) -> None:
    if not isinstance(text, str):
        raise UsageError(f'a tokenizer encodes one text, a str; got {type(text).__name__}')


def _unknown(text: str, position: int, expected: str) -> UserError:
    character = text[position]
    hint = ''
    if character == '\r':
        hint = (
            r'; it is part of a Windows line ending: replace \r\n by \n, for example with '
            'dos2unix'
        )
    elif '\udc80' <= character <= '\udcff':  # how Python reads such a byte of a command line
        hint = (
            f'; it is the byte 0x{ord(character) - 0xDC00:02x} of a text that is not UTF-8, or the '
            "terminal's locale is not UTF-8 (LC_ALL=C.UTF-8 is)"
        )
    return UserError(
        f'unknown character {character!r} (U+{ord(character):04X}) at position {position} of the '
        f'text: {expected}{hint}'
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
