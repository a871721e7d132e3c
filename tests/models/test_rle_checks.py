"""RLE from outside: what passes decodes to one mask and no other; what ends early, or goes on, does not pass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from models.geometry.rle import checked_rle, rle_bytes, rle_counts, rle_crop, rle_decode, rle_encode, rle_paste

HEIGHT, WIDTH = 23, 31


def _mask(seed: int, share: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).random((HEIGHT, WIDTH)) < share


def _passes(counts, size=(HEIGHT, WIDTH)) -> bool:
    try:
        checked_rle({"size": list(size), "counts": counts}, HEIGHT, WIDTH)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
def test_what_we_write_passes(share):
    for seed in range(20):
        rle = rle_encode(_mask(seed, share))
        assert checked_rle(rle, HEIGHT, WIDTH) == rle
        assert checked_rle(rle_bytes(rle), HEIGHT, WIDTH) == rle
    wide = rle_paste(np.ones((3, 3), bool), 30_000, 9_000, 20_000, 50_000)
    assert checked_rle(wide, 20_000, 50_000) == wide


def test_every_shortened_string_is_refused():
    counts = rle_encode(_mask(1))["counts"]
    assert [n for n in range(len(counts)) if _passes(counts[:n])] == []


@pytest.mark.parametrize(
    "counts",
    ["", "0", "abc", "P", "o", "\x00", "é", "1" * 9, "ppppppppppppppp0", "oooooooooooooooo", b"\xff", None, 3, [1, 2], b""],
)
def test_rubbish_is_refused(counts):
    assert not _passes(counts)


@pytest.mark.parametrize(
    "size", [(WIDTH, HEIGHT), (HEIGHT, WIDTH + 1), (0, 0), (-HEIGHT, -WIDTH), ("a", 1), (1,), (1e300, 1)]
)
def test_other_sizes_are_refused(size):
    assert not _passes(rle_encode(_mask(2))["counts"], size)


def _decodes_to_its_runs(counts: str) -> None:
    rle = {"size": [HEIGHT, WIDTH], "counts": counts}
    decoded = coco_mask.decode(rle_bytes(rle))
    runs = rle_counts(rle)
    expected = np.repeat(np.arange(len(runs)) % 2, runs).reshape(WIDTH, HEIGHT).T
    assert (decoded == expected).all()
    assert (rle_decode(rle) == (decoded == 1)).all()
    part, left, top = rle_crop(rle)
    assert decoded[top : top + part.shape[0], left : left + part.shape[1]].sum() == decoded.sum() == part.sum()


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=40))
def test_any_text_that_passes_decodes_to_its_runs(text):
    if _passes(text):
        _decodes_to_its_runs(text)


@given(st.integers(0, 30), st.integers(0, 400), st.integers(48, 111), st.booleans())
def test_a_string_with_one_character_changed_or_left_out(seed, place, code, leave_out):
    counts = rle_encode(_mask(seed, 0.3))["counts"]
    place %= len(counts)
    changed = counts[:place] + ("" if leave_out else chr(code)) + counts[place + 1 :]
    if _passes(changed):
        _decodes_to_its_runs(changed)


def _written(runs: list[int]) -> str:
    """Runs as pycocotools writes them, whatever they are."""
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            group = value & 0x1F
            value >>= 5
            more = value != (-1 if group & 0x10 else 0)
            text += chr(48 + group + (0x20 if more else 0))
    return text


@given(st.lists(st.integers(-50, HEIGHT * WIDTH), min_size=1, max_size=12), st.booleans())
def test_runs_pass_exactly_where_they_fill_the_image(runs, filled):
    runs = [*runs, HEIGHT * WIDTH - sum(runs)] if filled else runs
    assert _passes(_written(runs)) == (sum(runs) == HEIGHT * WIDTH and min(runs) >= 0)


def test_runs_below_zero_are_refused_whatever_their_sum():
    assert _passes(_written([3, 2, HEIGHT * WIDTH - 5]))
    assert not _passes(_written([3, -2, HEIGHT * WIDTH - 1]))
    assert not _passes(_written([HEIGHT * WIDTH + 4, -4]))


def test_a_number_of_too_many_characters_is_refused():
    # pycocotools shifts by as many bits as there are characters, and beyond 64 anything may come out.
    whole = _written([HEIGHT * WIDTH])
    assert _passes(whole)
    padded = whole[:-1] + chr(ord(whole[-1]) + 0x20)
    assert _passes(padded + "0")
    assert not _passes(padded + "P" * 12 + "0")
