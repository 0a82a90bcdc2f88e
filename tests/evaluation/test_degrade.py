"""degrade.py: noise as loud as it says, a room as long as it says, and the same ones every time."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from evaluation import degrade
from evaluation.suites import Example
from formats.audio_files import load

RATE = 16_000
RNG = np.random.default_rng
CLIP = np.sin(np.arange(RATE) / 7) * np.linspace(0.1, 0.5, RATE)  # a second
OTHERS = [
    RNG(n).normal(size=size) * loud for n, (size, loud) in enumerate([(9000, 1), (20_000, 9)])
]


@pytest.fixture
def examples(tmp_path) -> list[Example]:
    found = []
    for n in range(6):
        file = tmp_path / f"{n}.wav"
        soundfile.write(file, CLIP[: 8000 + 100 * n] / (n + 1), RATE, "FLOAT")
        found.append(Example(str(n), str(file), f"text {n}", ("x",), "here"))
    return found


@pytest.mark.parametrize("kind", ["white", "babble"])
@pytest.mark.parametrize("snr", [20.0, 0.0, -5.0])
def test_noise_is_so_many_decibels_below_the_clip(kind, snr):
    heard = degrade.degraded(kind, snr, CLIP, OTHERS, RNG(0))
    noise = heard - CLIP
    assert 10 * np.log10(degrade.power(CLIP) / degrade.power(noise)) == pytest.approx(snr)
    one_more = degrade.degraded(kind, snr, CLIP, OTHERS, RNG(1)) - CLIP
    assert np.abs(np.corrcoef(noise, one_more)[0, 1]) < 0.9, "wherever the talkers are"


def test_a_babble_is_of_the_others_each_as_loud():
    """What is left of it after the two others are taken out is nothing, and both have a part."""
    noise = degrade.degraded("babble", 0.0, CLIP, OTHERS, RNG(0)) - CLIP
    rng, parts = RNG(0), [np.resize(other, RATE) for other in OTHERS]
    shifted = np.stack([np.roll(part, rng.integers(RATE)) for part in parts], 1)
    weights, rest, *_ = np.linalg.lstsq(shifted, noise)
    assert rest == pytest.approx(0, abs=1e-9 * degrade.power(noise) * RATE)
    assert np.ptp(weights * [np.sqrt(degrade.power(part)) for part in parts]) == pytest.approx(0)


def test_a_room_decays_by_sixty_decibels_in_its_time():
    """Of a click: half of it comes directly, the rest falls off; nothing gets longer or louder."""
    click = np.zeros(RATE)
    click[0] = 1.0
    heard = degrade.degraded("reverb", 0.5, click, [], RNG(0))
    assert len(heard) == RATE and degrade.power(heard) == pytest.approx(degrade.power(click))
    assert heard[0] ** 2 == pytest.approx(0.5)
    assert not np.abs(heard[RATE // 2 :]).max() > 1e-12
    loud = [10 * np.log10(degrade.power(heard[i : i + 800])) for i in (400, 4400)]
    assert loud[0] - loud[1] == pytest.approx(60 * 4000 / 8000, abs=1.5)  # of 800 normal draws


@pytest.mark.parametrize(("speed", "length", "pitch"), [(0.9, 17_778, 396), (1.1, 14_546, 484)])
def test_what_is_played_faster_is_shorter_and_higher(speed, length, pitch):
    tone = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    heard = degrade.degraded("speed", speed, tone, [], RNG(0))
    assert len(heard) == length
    peak = np.abs(np.fft.rfft(heard)).argmax() * RATE / length
    assert peak == pytest.approx(pitch, abs=1)


def test_conditions_are_groups_and_the_same_every_time(examples, tmp_path):
    """Two folders hold the same samples; one noise serves all levels; levels stand in order."""
    names = ("babble:10", "babble:5", "white:5", "reverb", "speed:1.1")
    first, again = (degrade.conditions(examples[:2], examples, names, tmp_path / f) for f in "ab")
    assert len(first) == 2 * 6 and len({e.id for e in first}) == 12
    groups = sorted({e.group for e in first})
    assert (
        groups
        == "as it is;babble   5 dB;babble  10 dB;reverb 0.5 s;speed 1.1;white   5 dB".split(";")
    )
    assert [e.text for e in first] == ["text 0", "text 1"] * 6
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(load(one.audio), load(other.audio))
    by_id = {e.id: load(e.audio) for e in first}
    loud, faint = (by_id[f"0 babble:{snr}"] - by_id["0"] for snr in (5, 10))
    np.testing.assert_allclose(loud, faint * 10 ** (5 / 20), atol=1e-6)  # float32 on disk
    assert degrade.conditions(examples[:2], examples, (), tmp_path) == examples[:2]


def test_what_cannot_be_decoded_stays_as_it_is(examples, tmp_path):
    Path(examples[0].audio).write_bytes(b"no sound")
    found = degrade.conditions(examples[:1], examples, ("white:5",), tmp_path / "out")
    assert [e.audio for e in found] == [examples[0].audio] * 2
    assert found[1].group == "white   5 dB"


@pytest.mark.parametrize(
    "name", ["white", "white:loud", "babble:99", "reverb:0", "speed:3", "rain:5", "speed:nan", ""]
)
def test_a_condition_that_there_is_not_is_named(examples, tmp_path, name):
    with pytest.raises(
        ValueError, match=rf"--degrade {name}: no such condition; expected white:DB"
    ):
        degrade.conditions(examples, examples, (name,), tmp_path)


def test_too_few_clips_do_not_babble(examples, tmp_path):
    with pytest.raises(ValueError, match="--degrade babble:5: 3 other clips; expected at least 4"):
        degrade.conditions(examples[:1], examples[:4], ("babble:5",), tmp_path)
