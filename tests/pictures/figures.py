"""Pictures that compute: NF4's levels, memory by category; and two that show measured results.

The first two follow from the code alone. `curves` and `ladder` are drawn from the JSON of
`compare.py` and `ladder.py`, once that has been put into the repository.
"""

import math

import torch
from helpers import load
from svg import (BLUE, GREEN, GREY, OLIVE, ORANGE, PINK, PURPLE, RED, TEAL, document, line,
                 polygon, rectangle, text)

from common import hub, predict_memory, weights
from common.memory import readable_bytes

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, OLIVE, PINK, GREY)


def nf4():
    """The 16 levels over the Gaussian whose quantiles they are."""
    levels = load("chapter-03/nf4.py").nf4_levels().tolist()
    left, middle, bottom, unit, height = 30, 435, 250, 370, 200
    # A level v is a quantile z divided by the largest, so the Gaussian is drawn over z(v).
    largest = torch.special.ndtri(torch.tensor(0.9677083, dtype=torch.float64)).item()
    points = [(middle + v / 100 * unit, bottom - height * math.exp(-(v / 100 * largest) ** 2 / 2))
              for v in range(-100, 101)]
    borders = [-1.0] + [(a + b) / 2 for a, b in zip(levels, levels[1:])] + [1.0]
    parts = [text(left, 24, "NF4: a weight becomes the nearest of 16 levels", 15, weight=600)]
    for code, (low, high) in enumerate(zip(borders, borders[1:])):
        inside = [p for p in points if low <= (p[0] - middle) / unit <= high]
        ends = [(middle + v * unit, bottom - height * math.exp(-(v * largest) ** 2 / 2))
                for v in (low, high)]
        parts.append(polygon((ends[0][0], bottom), ends[0], *inside, ends[1], (ends[1][0], bottom),
                             fill=BLUE if code % 2 else TEAL, opacity=0.55))
    for code, level in enumerate(levels):
        x = middle + level * unit
        y = bottom - height * math.exp(-(level * largest) ** 2 / 2)
        parts += [line((x, y), (x, bottom + 6), stroke=ORANGE, width=2),
                  text(x, bottom + 22, str(code), 13, "middle", weight=600),
                  text(x + 4, bottom + 76, f"{level:.3f}", 12, turn=-90)]
    parts += [line((left, bottom), (2 * middle - left, bottom)),
              text(left, bottom + 100, "Code, and level: the weight over the largest of its block "
                   "of 64. Levels are dense where weights are.", 13)]
    return document(870, 366, "The 16 NF4 levels over a Gaussian: dense around zero, sparse at the "
                    "ends", parts)


def runs():
    """(name, bytes by category) of five ways to train Qwen3-0.6B, 4,096 tokens in a pack."""
    options = dict(tokens=4096, dtype=torch.bfloat16, varlen_kernel=True)
    source = hub.resolve("qwen3-0.6b")
    config = weights.read_config(source)
    with torch.device("meta"):
        dense = load("chapter-01/modeling_qwen3.py")
        dense = dense.Qwen3ForCausalLM(dense.Qwen3Config.from_dict(config))
        llama, lora = load("chapter-02/modeling_llama.py"), load("chapter-02/lora.py")
        adapted = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(config)).bfloat16()
    adapted = lora.apply_adapter(adapted, lora.AdapterConfig())
    third, own = load("chapter-03/modeling_llama.py"), load("chapter-03/lora.py")
    small = load("chapter-03/quantized_model.py").base_model(
        third.LlamaConfig.from_dict(config), source, torch.bfloat16, init="shapes")
    small = own.apply_adapter(small, own.AdapterConfig())
    chunked = options | {"chunk": 1024}
    yield "every weight, whole logits", predict_memory.memory(dense, **options)
    yield "every weight, chunked loss", predict_memory.memory(dense, **chunked)
    yield "LoRA r 16, whole logits", predict_memory.memory(adapted, **options)
    yield "LoRA r 16 on NF4, chunked loss", predict_memory.memory(small, **chunked)
    yield "the same, activation checkpointing", predict_memory.memory(
        small, **chunked, checkpointing="full")


def memory():
    """Predicted memory of a training step, category by category."""
    bars = list(runs())
    names = list(dict.fromkeys(name for _, sizes in bars for name, size in sizes.items() if size))
    colour = dict(zip(names, COLOURS))
    most = max(sum(sizes.values()) for _, sizes in bars)
    left, width = 20, 730
    parts = [text(left, 24, "Qwen3-0.6B, a pack of 4,096 tokens, bfloat16: predicted peak of a step",
                  15, weight=600)]
    for n, (label, sizes) in enumerate(bars):
        y, x = 46 + 58 * n, left
        parts.append(text(left, y + 13, label))
        for name in names:
            step = width * sizes.get(name, 0) / most
            parts.append(rectangle(x, y + 20, step, 24, colour[name]) if step >= 0.5 else "")
            x += step
        parts.append(text(x + 8, y + 37, f"{sum(sizes.values()) / 2**30:.1f} GiB", weight=600))
    x, y = left, 46 + 58 * len(bars) + 14
    for name in names:
        if x + 30 + 8 * len(name) > 860:
            x, y = left, y + 24
        parts += [rectangle(x, y, 14, 14, colour[name], round=3), text(x + 20, y + 12, name, 13)]
        x += 44 + 8 * len(name)
    return document(870, y + 34, "Memory of a training step by category, for five ways to train "
                    "Qwen3-0.6B", [part for part in parts if part])


def plot(series, title, labels):
    """Lines of (name, [(x, y), ...]), y in logarithms, each named at its right end."""
    left, right, top, bottom = 70, 690, 44, 360
    xs = [x for _, points in series for x, _ in points]
    ys = [y for _, points in series for _, y in points]
    low, high = math.log10(min(ys)), math.log10(max(ys))

    def place(x, y):
        return (left + (right - left) * (x - min(xs)) / (max(xs) - min(xs) or 1),
                bottom - (bottom - top) * (math.log10(y) - low) / (high - low or 1))

    parts = [text(left, 24, title, 15, weight=600), line((left, top), (left, bottom)),
             line((left, bottom), (right, bottom)),
             text((left + right) / 2, bottom + 40, labels[0], 13, "middle"),
             text(18, (top + bottom) / 2, labels[1], 13, "middle", turn=-90)]
    ticks = (10.0**i for i in range(math.ceil(low), math.floor(high) + 1))
    parts += [text(left - 8, place(min(xs), y)[1] + 4, f"{y:.3g}", 12, "end") for y in ticks]
    parts += [text(place(x, min(ys))[0], bottom + 20, f"{x:.0f}", 12, "middle")
              for x in round_numbers(min(xs), max(xs))]
    ends = sorted((place(*points[-1])[1], n) for n, (_, points) in enumerate(series))
    under = top - 17
    for end, n in ends:
        under = max(end, under + 17)  # names do not overlap
        parts += [line((right + 3, end), (right + 16, under), stroke=COLOURS[n], width=1),
                  text(right + 20, under + 4, series[n][0], 13, fill=COLOURS[n], weight=600)]
    parts += [line(*(place(*point) for point in points), stroke=COLOURS[n], width=2)
              for n, (_, points) in enumerate(series)]
    return document(870, max(420, int(under) + 20), title, parts)


def round_numbers(low, high):
    """Four to eight multiples of 1, 2 or 5 times a power of ten, from `low` to `high`."""
    step = next(step for i in range(-3, 9) for step in (10.0**i, 2 * 10.0**i, 5 * 10.0**i)
                if (high - low) / step < 8)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def smooth(points, window=10):
    """Means of `window` neighbours, since single steps are noisy."""
    groups = [points[i:i + window] for i in range(0, len(points), window)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def curves(rows):
    """Training loss of every method at its own best rate, from compare.py's results.json."""
    series = [(row["method"], smooth(row["curve"])) for row in rows]
    return plot(series, "Training loss, each method at its own best learning rate",
                ("step", "loss (mean of 10 steps)"))


def ladder(rows):
    """Speed and memory of every rung, from ladder.py's JSON: dicts with name, tokens_per_second
    and peak_memory_bytes, in the order in which they were measured."""
    left, speed, space, width = 20, 290, 600, 170
    fastest = max(row["tokens_per_second"] for row in rows)
    largest = max(row["peak_memory_bytes"] for row in rows)
    parts = [text(left, 24, "One change at a time", 15, weight=600),
             text(speed, 24, "tokens per second", 13), text(space, 24, "peak memory", 13)]
    for n, row in enumerate(rows):
        y = 40 + 28 * n
        fast = width * row["tokens_per_second"] / fastest
        big = width * row["peak_memory_bytes"] / largest
        parts += [text(left, y + 15, row["name"], 13), rectangle(speed, y, fast, 20, BLUE),
                  text(speed + fast + 8, y + 15, f"{row['tokens_per_second']:,.0f}", 13),
                  rectangle(space, y, big, 20, ORANGE),
                  text(space + big + 8, y + 15, readable_bytes(row["peak_memory_bytes"]), 13)]
    return document(870, 56 + 28 * len(rows), "Tokens per second and peak memory, from the naive "
                    "loop one change at a time", parts)


def preferences(results):
    """Of preferences.py's JSON, the first seed's held-out evaluations: what each loss wins, and
    what it does to the chosen answers."""
    rows = [row for row in results["rows"] if row["loss"].split()[0] == "dpo"]
    panels = (("pair_accuracy", "held-out pairs won", "{:.0%}"),
              ("logp_chosen", "log p of the chosen answer", "{:.1f}"))
    top, bottom, width = 44, 240, 280
    parts = []
    for panel, (key, title, form) in enumerate(panels):
        left = 60 + 380 * panel
        series = [row["curves"][key] for row in rows]
        values = [value for points in series for _, value in points]
        low, high, steps = min(values), max(values), series[0][-1][0]

        def place(step, value):
            return (left + width * step / steps,
                    bottom - (bottom - top) * (value - low) / (high - low))

        parts += [text(left, 24, title, 15, weight=600), line((left, top), (left, bottom)),
                  line((left, bottom), (left + width, bottom)),
                  text(left + width / 2, bottom + 38, "step", 13, "middle")]
        parts += [text(left - 8, place(0, value)[1] + 4, form.format(value), 12, "end")
                  for value in (low, high)]
        parts += [text(place(step, low)[0], bottom + 20, f"{step:.0f}", 12, "middle")
                  for step in round_numbers(0, steps)]
        parts += [line(*(place(*point) for point in points), stroke=COLOURS[n], width=2)
                  for n, points in enumerate(series)]
        parts += [text(left + width + 6, place(*points[-1])[1] + 4, rows[n]["loss"], 12,
                       fill=COLOURS[n], weight=600) for n, points in enumerate(series) if panel]
    return document(870, 290, "Plain DPO wins as many pairs as DPO with NLL, and its chosen answers "
                    "become unlikely", parts)
