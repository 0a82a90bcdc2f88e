"""Published: the paper's figures, those of the systems that it compares with, and VoiceBench's.

Reads: nothing of ours.   Read next: metrics.py.
"""

# Read off the bars of the published charts (their vector graphics): within 0.3 for questions, 0.1
# for the rest. "pedant" was PANDA, as qa-metrics 0.1 computed it: later versions score otherwise.
# "prompt_ignoring" is what the authors found in 50 answers that they read.
PUBLISHED_SYSTEMS = ("Qwen Audio", "Qwen 2 Audio", "SALMONN", "DiVA Llama 3 8B")
PUBLISHED = {}  # {suite: {group, or "" for all: {metric: {system: score}}}}
for _line in """
heysquad pedant         45.1 46.1 48.7 55.0
sd_qa    pedant         43.3 43.3 46.8 53.8
sd_qa    pedant   usa   42.5 44.4 48.2 54.8
sd_qa    pedant   gbr   43.6 44.6 47.1 54.6
sd_qa    pedant   phl   42.1 42.8 45.8 52.6
sd_qa    pedant   ind_s 43.0 42.8 45.7 54.0
sd_qa    pedant   ind_n 42.6 41.9 45.5 52.2
sd_qa    pedant   irl   43.0 43.5 47.7 54.2
sd_qa    pedant   aus   45.3 44.3 47.9 55.5
sd_qa    pedant   nzl   44.3 44.9 48.0 55.0
sd_qa    pedant   nga   42.3 41.6 45.9 52.9
sd_qa    pedant   zaf   43.9 42.6 45.8 52.6
covost   bleu           15.7 16.1  9.1 13.8
covost   bleu     ar     8.1 13.3  0.7 12.9
covost   bleu     zh-CN 25.2 16.5 19.7 12.3
covost   bleu     de    28.9 30.3 21.0 27.6
covost   bleu     id    17.0 25.7 11.5 22.9
covost   bleu     ja    22.6 16.5  8.4  6.2
covost   bleu     ta     0.2  0.4  0.0  3.2
covost   bleu     tr     7.7  9.9  2.1 11.8
meld     weighted_f1     3.0 37.7 31.7 41.3
iemocap  weighted_f1     9.4 33.9 17.4 50.6
mustard  accuracy       49.7 55.5 50.1 52.6
ur_funny accuracy       54.5 50.7 52.3 50.2
heysquad prompt_ignoring 30.0 4.0 8.0 0.0
""".strip().split("\n"):
    _suite, _metric, *_group, _a, _b, _c, _d = _line.split()
    _scores = dict(zip(PUBLISHED_SYSTEMS, map(float, (_a, _b, _c, _d)), strict=True))
    PUBLISHED.setdefault(_suite, {}).setdefault("".join(_group), {})[_metric] = _scores

# The leaderboard in the README of MatthewCYM/VoiceBench, commit 5338154 of 12 June 2025, read on
# 26 November 2026. Its scores of 1 to 5 (the first three) are times 20 here, as in its mean. DiVA
# there has Llama 3, the others Llama 3.1; what was longer than 30 s was cut for it.
VOICEBENCH = {}  # {system: {subset: score}}
_subsets = "alpacaeval_full commoneval wildvoice sd-qa mmsu openbookqa bbh ifeval advbench overall"
for _name, _line in {
    "DiVA, published": "73.4 70.8 74.8 57.05 25.76 25.49 51.80 39.15 98.27 57.39",
    "Ultravox 0.5, 8B": "91.8 82.2 85.6 58.68 54.16 68.35 67.80 66.51 98.65 74.86",
    "Whisper, Llama 3.1": "90.6 80.8 83.2 70.43 62.43 72.53 69.70 69.53 98.08 77.48",
}.items():
    VOICEBENCH[_name] = dict(zip(_subsets.split(), map(float, _line.split()), strict=True))
