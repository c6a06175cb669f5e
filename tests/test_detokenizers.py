"""De-tokenizers turn the spacing of each corpus into natural text that can be undone."""

import re

import pytest

from gpt2_jax.inference.detokenizers import RULES, make_detokenizer

# Sentences of our own in the spacing of each corpus, and the same as people write them.
WIKITEXT = [
    (
        ' \n = The Old Mill = \n \n',
        '\n= The Old Mill =\n\n',
    ),
    (
        ' = = History = = \n',
        '== History ==\n',
    ),
    (
        ' = = = 1990 \u2013 95 = = = \n',
        '=== 1990\u201395 ===\n',
    ),
    (
        ' = = = = A = b = = = = \n',
        '==== A = b ====\n',
    ),
    (
        ' It is a two @-@ part film , and cost 1 @,@ 050 of 16 @.@ 9 million . \n',
        'It is a two-part film, and cost 1,050 of 16.9 million.\n',
    ),
    (
        ' The <unk> \'s role as " Ann " in " Al \'s Story " ; he said : " you don \'t know ! " \n',
        'The <unk>\'s role as "Ann" in "Al\'s Story"; he said: "you don\'t know!"\n',
    ),
    (
        ' At 22 : 30 ( 23 : 30 local time ) the ( " first " ) ship left ... and 10 % stayed ? \n',
        'At 22:30 (23:30 local time) the ("first") ship left... and 10% stayed?\n',
    ),
    (
        " The ships ' officers paid $ 5 or \xa3 4 @.@ 5 [ sic ] per 3 / 4 mile . \n",
        "The ships' officers paid $5 or \xa34.5 [sic] per 3/4 mile.\n",
    ),
    (
        ' Life \u2013 as it is \u2014 in Wade \u2013 Giles , one " open . \n',
        'Life \u2013 as it is \u2014 in Wade \u2013 Giles, one " open.\n',
    ),
]
PTB = [
    (
        " it is n't the company 's $ N billion plan \n we 'll see what <unk> corp. 's "
        'owners say \n',
        "it isn't the company's $N billion plan\nwe'll see what <unk> corp.'s owners say\n",
    ),
    (
        " the investors ' N N loss at standard & poor 's said the nyt\\/cbs poll \n",
        "the investors' N N loss at standard & poor's said the nyt/cbs poll\n",
    ),
]
BILLION = [
    (
        '" We don \'t know , " he said ( much ) later .\nIt \'s $ 7.5 million in the 1990s '
        '... or 10 % ?\n',
        '"We don\'t know," he said (much) later.\nIt\'s $7.5 million in the 1990s... or 10%?\n',
    ),
]
EXAMPLES = [
    (name, *pair)
    for name, pairs in (('wikitext', WIKITEXT), ('ptb', PTB), ('1bw', BILLION))
    for pair in pairs
]


@pytest.mark.parametrize(('name', 'spaced', 'written'), EXAMPLES)
def test_spaced_text_becomes_natural_text(name, spaced, written):
    assert make_detokenizer(name)(spaced) == written
    assert make_detokenizer('none')(spaced) == spaced
    assert make_detokenizer(name)(spaced * 2) == written * 2  # no rule reaches beyond its line


# What the tokenizer of each corpus takes for a word; WikiText's marks the signs within a word.
WORDS = {
    'wikitext': r"(?P<within>(?<=\w)-(?=\w)|(?<=\d)[,.](?=\d))|<unk>|'?\w+|\.\.\.|[^\w\s]",
    'ptb': r"n't\b|'(?:s|ll)\b|['$]|[^\s'$]+?(?=n't\b|'|\s|$)",
    '1bw': r"\d+(?:[,.]\d+)+|'?\w+|\.\.\.|[^\w\s]",
}


@pytest.mark.parametrize(('name', 'spaced', 'written'), EXAMPLES)
def test_the_old_text_can_be_restored(name, spaced, written):
    again = ''
    for line in written.splitlines():
        words = [
            f'@{word[0]}@' if word.groupdict().get('within') else word[0]
            for word in re.finditer(WORDS[name], line)
        ]
        edge = '' if name == '1bw' else ' '
        again += edge + ''.join(f'{word} ' for word in words)[: None if edge else -1] + '\n'
    assert again.replace('nyt/', 'nyt\\/') == spaced


def test_every_corpus_has_examples():
    assert {name for name, *_ in EXAMPLES} == set(RULES) - {'none'}
