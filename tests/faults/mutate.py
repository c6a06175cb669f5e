"""Random damage to files: to their bytes, to their JSON, and to what kind of file they are."""

import copy
import json
import os
import random
from pathlib import Path

INTERESTING = [
    b'\x00',
    b'\xff',
    b'\x7f',
    b'\x80',
    b'\n',
    b'\r\n',
    b'"',
    b'\\',
    b'{',
    b'}',
    b'[',
    b']',
]
INTERESTING += [
    b'\xef\xbb\xbf',
    b'\xed\xa0\x80',
    b'\x1b]0;x\x07',
    b'../',
    b'/dev/zero',
    b'-1',
    b'9' * 400,
]
INTERESTING += [
    b'(' * 200,
    b'[' * 5000,
    b'\x1f\x8b',
    b'PK\x03\x04',
    b'\x93NUMPY',
    b'PAR1',
    bytes(64),
]

VALUES = [None, True, False, -1, 0, 1, 2**31, 2**63, 10**400, 1.5, 1e308, -0.0, '', ' ', 'a' * 5000]
VALUES += [
    '..',
    '.',
    '../x',
    '/etc/hostname',
    '/dev/zero',
    'a/b',
    'a\\b',
    'a\0b',
    '\x1b[2J',
    '\u202e',
    '🎭',
]
VALUES += [
    'float64',
    'object',
    '>u2',
    'uint16',
    'uint8',
    'nan',
    '0' * 64,
    [],
    {},
    [[]],
    [1, 'a'],
    {'a': 1},
]
PATHS = ['../a.txt', '/etc/hostname', '/dev/zero', '../out/manifest.json', './train_00000.npy', '']
RAW_VALUES = [
    'NaN',
    '-Infinity',
    '1e999',
    '9' * 5000,
    '"\\ud800"',
    '[' * 5000,
    '{"a":' * 70 + '1' + '}' * 70,
]


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """The bytes with one to eight changes: flips, cuts, repetitions, insertions, moves."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice([1, 1, 2, 4, 8, 64, 1000]))
        kind = rng.randrange(7)
        if kind == 0 and start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 1 and start < len(data):
            data[start] = rng.randrange(256)
        elif kind == 2:
            del data[start:stop]
        elif kind == 3:
            data[start:start] = data[start:stop] * rng.choice([1, 2, 50])
        elif kind == 4:
            data[start:start] = rng.choice(INTERESTING)
        elif kind == 5:
            data[start:stop] = rng.choice(INTERESTING)
        else:
            del data[start:]
    return bytes(data)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """JSON with values or keys replaced, removed, added or moved; now and then any bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, data)
    content, raw = json.loads(data), '"the raw value"'
    for _ in range(rng.choice([1, 1, 2, 4])):
        places = list(_places(content))
        if not places:
            break
        parent, key = rng.choice(places)
        kind = rng.randrange(7)
        texts = [(p, k) for p, k in places if isinstance(p[k], str)]
        if kind == 0:
            del parent[key]
        elif kind == 1:
            parent[key] = copy.deepcopy(rng.choice(places)[0])
        elif kind == 2 and isinstance(parent, dict):
            parent[rng.choice([v for v in VALUES if isinstance(v, str)])] = parent.pop(key)
        elif kind == 3:
            parent[key] = raw.strip('"')
        elif kind == 4 and texts:
            parent, key = rng.choice(texts)
            parent[key] = rng.choice(PATHS)
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(content).replace(raw, rng.choice(RAW_VALUES)).encode()


def _places(value):
    """Every (container, key or index) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list) and item:
            yield from _places(item)


def mutate_kind(rng: random.Random, path: Path) -> None:
    """Puts something else than a regular file in a file's place."""
    path.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind < 5:
        path.symlink_to(['/dev/zero', path.name, 'nowhere'][kind - 2])
