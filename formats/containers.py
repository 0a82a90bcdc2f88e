"""Correct the lengths in an audio header to what the file holds, or refuse the file.

libsndfile and FFmpeg decode only as much as the header says, without an error if the file holds
more. So the bytes are counted before they are decoded:

    MP3                frame by frame; the count goes into the Xing frame; joined MP3s are split
    FLAC               the length is removed, the file decoded to its end, and the two compared
    WAV, AIFF, CAF     chunk by chunk; an unknown length is replaced by that of the remaining bytes
    AU                 as WAV, with its single header
    NIST               decoded to the end of the file, and compared with its header
    Ogg                page by page; several audio streams are refused: only the first is decoded

Other formats of libsndfile (VOC, W64, MAT, ...) cannot be checked in this way and are refused.

Reads: nothing of ours.   Read next: audio_files.py.
"""

import functools
import re
from collections.abc import Iterator
from io import BufferedIOBase

FORMATS = "MP3", "FLAC", "OGG", "WAV", "WAVEX", "RF64", "AIFF", "CAF", "AU", "NIST"
UNKNOWN_LENGTH = 0x7FFF0000  # bytes; a pipe writes a length of 0, or just below 2^31 or 2^32
MAX_TRAILING_BYTES = 512  # ignored behind the samples; the lowest usual rate is 8,000 bytes/s
RUN = 4  # MP3 frames behind each other that are no accident of other bytes


def split_concatenated_mp3(content: bytes) -> list[bytearray]:
    """Split joined MP3s at their Xing frames; any other file is one part.

    They are decoded one by one: each has encoder padding at both ends, which its Xing frame counts.
    """
    at, cuts = _id3_length(content), [0]
    if content[at : at + 1] == b"\xff":
        for tag in re.finditer(b"Xing|Info", content):
            starts = [tag.start() - side for side in {*SIDE.values()} if tag.start() > at + side]
            cuts += [start for start in starts if _is_tagged(content, start)][:1]
    return [bytearray(content[a:b]) for a, b in zip(cuts, [*cuts[1:], len(content)], strict=True)]


def fix_header(content: bytearray) -> int | None:
    """Correct the header of `content` in place. Returns the header's number of samples if the
    caller must compare it with the number of decoded samples.

    Raises ValueError if the file is cut, or holds more than one recording.
    """
    at = _id3_length(content)
    match bytes(content[at : at + 4]):
        case b"RIFF" | b"RIFX" | b"RF64" | b"FORM" | b"caff":
            _fix_chunks(_without_tags(content))
        case b".snd" | b"dns.":
            _fix_au(_without_tags(content))
        case b"fLaC":
            return _remove_flac_length(_without_tags(content), at)
        case b"NIST":
            count = re.search(rb"sample_count -i (\d+)", content[:4096])
            return int(count[1]) if count else None
        case b"OggS":
            _check_ogg(content)
        case _ if content[at : at + 1] == b"\xff":
            _fix_mp3(content, at)
    return None


def _id3_length(content: bytes | bytearray, at: int = 0) -> int:
    """Size in bytes of an ID3v2 tag in front of the audio, 0 if there is none."""
    if content[at : at + 3] != b"ID3" or len(content) < at + 10:
        return 0
    size = functools.reduce(lambda size, byte: size << 7 | byte & 127, content[at + 6 : at + 10])
    return 10 + size + 10 * (content[at + 5] >> 4 & 1)  # perhaps with a footer


def _without_tags(content: bytearray) -> bytearray:
    """Remove the ID3v1 and APE tags behind the audio, in place; returns `content`."""
    if content[-128:-125] == b"TAG":
        del content[-128:]
    if content[-32:-24] == b"APETAGEX":  # its footer: the length with it, and if there is a header
        length = int.from_bytes(content[-20:-16], "little") + 32 * (content[-9] >> 7)
        del content[-min(length, len(content)) :]
    return content


def _check_length(header_bytes: int, actual_bytes: int) -> None:
    """Raises ValueError if the file holds fewer bytes of samples than its header says, or more."""
    if actual_bytes < header_bytes:
        raise ValueError(
            f"cut short: {actual_bytes:,} bytes of sound; its header says {header_bytes:,}. "
            "Copy or download it again."
        )
    if actual_bytes > header_bytes + MAX_TRAILING_BYTES:
        raise ValueError(
            f"{actual_bytes - header_bytes:,} bytes lie behind the end that its header gives; "
            "expected nothing there. If recordings were joined, join their samples; else convert "
            "the file."
        )


def _is_chunk(content: bytearray, at: int, order: str, width: int) -> bool:
    """Whether a chunk begins here: a name, and a length within the file."""
    name, rest = bytes(content[at : at + 4]), len(content) - at - 4 - width
    length = int.from_bytes(content[at + 4 : at + 4 + width], order)
    known = re.fullmatch(rb"[\w(][\w (){}.+-]{3}", name) and name not in (b"RIFF", b"FORM")
    return bool(known and 0 <= length <= rest)


def _fix_chunks(content: bytearray) -> None:
    """RIFF, RF64, AIFF, CAF: a name, a length, so many bytes; then the next."""
    kind = bytes(content[:4])
    order = "little" if kind in (b"RIFF", b"RF64") else "big"
    at, width = (8, 8) if kind == b"caff" else (12, 4)
    while len(content) >= at + 4 + width:
        start = at + 4 + width
        length, rest = int.from_bytes(content[at + 4 : start], order), len(content) - start
        if content[at : at + 4] in (b"data", b"SSND"):
            if kind == b"RF64" and length == 0xFFFFFFFF:
                length = int.from_bytes(content[28:36], "little")  # where the chunk ds64 has it
            empty = rest <= MAX_TRAILING_BYTES or _is_chunk(content, start, order, width)
            if length >= UNKNOWN_LENGTH or (length == 0 and not empty):
                length = rest
                content[at + 4 : start] = length.to_bytes(width, order)
            if length > rest:
                _check_length(length, rest)
        elif not _is_chunk(content, at, order, width):
            break
        at = start + length
        if width == 4 and length & 1:
            # A pad byte follows an odd length. Some recorders leave it out: insert it.
            padded = _is_chunk(content, at + 1, order, width)
            if not padded and _is_chunk(content, at, order, width):
                content.insert(at, 0)
            at += 1
    _check_length(0, max(0, len(content) - at))


def _fix_au(content: bytearray) -> None:
    order = "big" if content[:1] == b"." else "little"
    start, length = (int.from_bytes(content[i : i + 4], order) for i in (4, 8))
    rest = max(0, len(content) - start)
    if length >= UNKNOWN_LENGTH or length == 0:
        length = rest
        content[8:12] = length.to_bytes(4, order)
    _check_length(length, rest)


def _remove_flac_length(content: bytearray, at: int) -> int | None:
    """Its length becomes unknown; returns what it was, None if it was unknown before."""
    if content.find(b"fLaC\0\0\0\x22", at + 4) >= 0:
        raise ValueError(
            "several FLAC files in one; expected one recording. Join their samples instead."
        )
    word = int.from_bytes(content[at + 18 : at + 26], "big")
    content[at + 18 : at + 26] = (word >> 36 << 36).to_bytes(8, "big")  # 36 bits: samples
    return word & (1 << 36) - 1 or None


def _check_ogg(content: bytearray) -> None:
    streams, at = 0, 0
    while (at := content.find(b"OggS", at)) >= 0:
        segments = content[at + 27 : at + 27 + content[at + 26]] if len(content) > at + 26 else b""
        start = at + 27 + len(segments)
        end = start + sum(segments)
        if not segments or end > len(content):
            raise ValueError("cut short: its last page is not whole. Copy or download it again.")
        begins = content[at + 5] & 2  # the first page of a stream names its codec
        first = content[start : start + 8]
        streams += bool(begins) and first.startswith(
            (b"\x01vorbis", b"Opus", b"\x7fFLAC", b"Speex")
        )
        at = end
    if streams > 1:
        raise ValueError(
            f"{streams} streams of sound in one Ogg file; expected one. Decode them and join "
            "their samples, or extract one."
        )


# ---------------------------------------------------------------------------------------------
# MP3


KILOBITS = {  # a second, by the samples of a frame: MPEG 1, MPEG 2 and 2.5
    1152: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    576: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
SIDE = {(1152, False): 36, (1152, True): 21, (576, False): 21, (576, True): 13}  # bytes before Xing


@functools.cache
def _frame(header: int) -> tuple[int, int, tuple[int, bool]] | None:
    """What four bytes say: (bytes, samples, (rate, is it mono)), or None if no frame begins so."""
    version, layer, rate = header >> 19 & 3, header >> 17 & 3, header >> 10 & 3
    index, padding, mono = header >> 12 & 15, header >> 9 & 1, header >> 6 & 3 == 3
    if header >> 21 != 0x7FF or version == 1 or layer != 1 or rate == 3 or index in (0, 15):
        return None  # not MPEG's layer III
    rate = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    samples = 1152 if version == 3 else 576
    return samples * 125 * KILOBITS[samples][index] // rate + padding, samples, (rate, mono)


def _is_tagged(content: bytes | bytearray, at: int) -> bool:
    """Whether an MP3's Xing frame begins here."""
    frame = _frame(int.from_bytes(content[at : at + 4], "big"))
    tag = at + SIDE[frame[1], frame[2][1]] if frame else 0
    return bool(frame) and content[tag : tag + 4] in (b"Xing", b"Info")


def mp3_frames(content: bytearray, at: int) -> Iterator[tuple[int, int, int, tuple[int, bool]]]:
    """(start, end, samples, kind) of all frames; behind other bytes only if RUN stand together."""
    run, first = [], True
    while at + 4 <= len(content):
        frame = _frame(int.from_bytes(content[at : at + 4], "big"))
        if frame and at + frame[0] <= len(content):
            run.append((at, at := at + frame[0], *frame[1:]))
            continue
        if run and (first or len(run) >= RUN):
            yield from run
            first = False
        elif run:
            at = run[0][0]
        run = []
        at = content.find(b"\xff", at + (_id3_length(content, at) or 1))
        if at < 0:
            return
    if first or len(run) >= RUN:
        yield from run


def mp3_count(content: bytearray, at: int) -> int | None:
    """Where the Xing frame counts the others, if there is one, and it does."""
    if not _is_tagged(content, at):
        return None
    tag = max(content.find(name, at + 4, at + 44) for name in (b"Xing", b"Info"))
    return tag + 8 if len(content) > tag + 12 and content[tag + 7] & 1 else None


def count_mp3_samples(stream: BufferedIOBase) -> int | None:
    """Samples of an MP3 by its frames, if no Xing frame counts them; libsndfile would guess."""
    content = bytearray(stream.read(1 << 16))
    if (at := _id3_length(content)) + 64 > len(content):  # behind a picture
        content += stream.read()
    if mp3_count(content, at):
        return None
    content += stream.read()
    return sum(samples for _, _, samples, _ in mp3_frames(content, at))


def _fix_mp3(content: bytearray, at: int) -> None:
    """The Xing frame counts all that are there, also of one that had none behind it."""
    frames = [*mp3_frames(content, at)]
    if not frames:
        raise ValueError("no frame of MPEG layer III; expected MP3, FLAC, Ogg or WAV. Convert it.")
    kinds = dict.fromkeys(kind for *_, kind in frames)
    if len(kinds) > 1:
        raise ValueError(
            f"its frames change among {', '.join(map(_named, kinds))}; expected one recording. "
            "Join samples instead, or convert the file."
        )
    if frames[0][0] + sum(end - start for start, end, *_ in frames) < frames[-1][1]:
        # libsndfile gives up where much else stands between
        content[at:] = b"".join(content[start:end] for start, end, *_ in frames)
    if place := mp3_count(content, at):
        said, there = int.from_bytes(content[place : place + 4], "big"), len(frames) - 1
        if there + 1 < said:  # some encoders count the Xing frame too
            raise ValueError(
                f"cut short: {there} frames; its header says {said}. Copy or download it again."
            )
        if there > said:
            content[place : place + 4] = there.to_bytes(4, "big")
        return
    # Without a count libsndfile takes the first frame's bytes for those of all: it gets one.
    head = content[at : at + 4]
    head[1:3] = head[1] | 1, 8 << 4 | head[2] & 0x0C  # no checksum; 64 or 112 kbit/s give it room
    frame = head.ljust(_frame(int.from_bytes(head, "big"))[0], b"\0")
    side = SIDE[frames[0][2], frames[0][3][1]]
    frame[side : side + 12] = b"Info\0\0\0\1" + len(frames).to_bytes(4, "big")
    content[at:at] = frame


def _named(kind: tuple[int, bool]) -> str:
    return f"{kind[0]} Hz {'mono' if kind[1] else 'stereo'}"
