"""Pictures that explain: packing, the decoder block, three members of the LoRA family."""

from svg import (BLUE, GREEN, GREY, INK, ORANGE, PURPLE, box, circle, document, line, polygon,
                 rectangle, text)

LENGTHS = (5, 9, 2, 4)  # tokens of the four documents in the picture of packing
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)


def packing():
    """A padded batch against a packed row, and what attention computes for each."""
    cell, longest, total = 22, max(LENGTHS), sum(LENGTHS)
    left, right = 20, 410
    parts = [text(left, 24, "Padded: as wide as the longest", 15, weight=600),
             text(right, 24, "Packed: one row", 15, weight=600)]

    def token(x, y, position, colour):
        return (rectangle(x + 1, y + 1, cell - 2, cell - 2, colour, round=3)
                + text(x + cell / 2, y + 15.5, str(position), 12, "middle", "#ffffff"))

    for row, (length, colour) in enumerate(zip(LENGTHS, COLOURS)):
        for column in range(longest):
            x, y = left + column * cell, 44 + row * cell
            parts.append(token(x, y, column, colour) if column < length else
                         rectangle(x + 1.5, y + 1.5, cell - 3, cell - 3, "none", INK, dashed=True))
    places = len(LENGTHS) * longest
    parts.append(text(left, 154, f"{places} places, {places - total} of them padding"))

    start, y = 0, 44 + cell
    parts.append(text(right, y - 8, "position_ids: each document counts from 0", 13))
    for length, colour in zip(LENGTHS, COLOURS):
        parts += [token(right + (start + i) * cell, y, i, colour) for i in range(length)]
        start += length
    ends = [sum(LENGTHS[:n]) for n in range(len(LENGTHS) + 1)]
    for end in ends:
        x = right + end * cell
        parts += [line((x, y + cell + 2), (x, y + cell + 9)),
                  text(x, y + cell + 23, str(end), 13, "middle")]
    parts += [text(right, y + cell + 42, "cu_seqlens: where each document begins, and the end", 13),
              text(right, 154, f"{total} places, none of them padding")]

    small, top = 10, 218
    parts += [text(left, 200, "Its attention: each row for itself", 15, weight=600),
              text(right, 200, "Its attention: each document for itself", 15, weight=600)]
    for n, (length, colour) in enumerate(zip(LENGTHS, COLOURS)):
        x, y = left + (n % 2) * (longest + 1) * small, top + (n // 2) * (longest + 1) * small
        for i in range(longest):
            parts.append(rectangle(x, y + i * small, (i + 1) * small, small,
                                   *((colour,) if i < length else (INK, None, False, 0, 0.3))))
        parts.append(rectangle(x, y, longest * small, longest * small, "none", INK))
    padded = len(LENGTHS) * longest * (longest + 1) // 2
    packed = sum(length * (length + 1) // 2 for length in LENGTHS)
    for n, words in enumerate((f"{padded} pairs of tokens,", f"{padded - packed} of them for",
                               "padding, which", "teaches nothing.")):
        parts.append(text(left + 208, top + 20 + 19 * n, words))
    for begin, length, colour in zip(ends, LENGTHS, COLOURS):
        for i in range(length):
            parts.append(rectangle(right + begin * small, top + (begin + i) * small,
                                   (i + 1) * small, small, colour))
    parts.append(rectangle(right, top, total * small, total * small, "none", INK))
    for n, words in enumerate((f"{packed} pairs of tokens.", "A token sees itself and what",
                               "came before it in its own", "document; nothing crosses",
                               "a border.")):
        parts.append(text(right + total * small + 16, top + 20 + 19 * n, words))
    return document(870, 432, "Four documents as a padded rectangle and as one packed row, with the "
                    "attention mask of each", parts)


def decoder():
    """The decoder and one of its layers, with the shape of every tensor."""
    parts, centre = [], 110
    stack = [("input_ids", "(T,)", None), ("embed_tokens", None, BLUE), ("x", "(T, D)", None),
             ("DecoderLayer", "L of them", ORANGE), ("x", "(T, D)", None), ("norm", None, GREY),
             ("head", "the embedding, if tied", BLUE), ("logits", "(T, V)", None)]
    y = 40
    for n, (name, note, colour) in enumerate(stack):
        height = 26 if colour is None else 44 if note else 32
        if colour is None:
            parts.append(text(centre, y + 18, f"{name}  {note}", 14, "middle"))
        else:
            parts.append(box(centre - 80, y, 160, height, name, colour, below=note))
        if n + 1 < len(stack):
            parts.append(line((centre, y + height + 1), (centre, y + height + 24), arrow=True))
        y += height + 26
    for n, words in enumerate(("T tokens, D model width,", "H query, K key/value heads,",
                               "d head size, F feed-forward,", "V vocabulary")):
        parts.append(text(20, 508 + 19 * n, words, 13))

    stream, middle = 300, 555  # the residual stream, and the middle of what happens beside it
    parts += [rectangle(240, 12, 610, 560, "none", INK, dashed=True, round=8),
              text(838, 34, "one DecoderLayer", 15, "end", weight=600),
              text(stream, 40, "x  (T, D)", 14, "middle")]
    parts.append(line((stream, 50), (stream, 305), arrow=True))
    parts.append(line((stream, 64), (middle, 64), (middle, 78), arrow=True))
    parts.append(box(middle - 90, 80, 180, 28, "input_layernorm", GREY))
    columns = {"q_proj": (middle - 150, "(T, H, d)"), "k_proj": (middle, "(T, K, d)"),
               "v_proj": (middle + 150, "(T, K, d)")}
    for name, (x, shape) in columns.items():
        parts += [line((middle, 108), (middle, 116), (x, 116), (x, 126), arrow=True),
                  box(x - 62, 128, 124, 42, name, BLUE, below=shape)]
        if name != "v_proj":
            parts += [line((x, 170), (x, 182), arrow=True),
                      box(x - 62, 184, 124, 28, f"{name[0]}_norm, rotary", GREY, 13)]
        parts.append(line((x, 170 if name == "v_proj" else 212), (x, 232), arrow=True))
    parts += [box(middle - 212, 234, 424, 30, "varlen_attention, within each document", ORANGE),
              text(middle + 286, 224, "cu_seqlens", 13, "end"),
              line((middle + 280, 230), (middle + 280, 249), (middle + 214, 249), arrow=True),
              line((middle, 264), (middle, 280), arrow=True),
              box(middle - 90, 282, 180, 42, "o_proj", BLUE, below="(T, H·d) → (T, D)"),
              line((middle - 90, 317), (stream + 12, 317), arrow=True), circle(stream, 317, "+")]

    parts.append(line((stream, 329), (stream, 526), arrow=True))
    parts.append(line((stream, 344), (middle, 344), (middle, 356), arrow=True))
    parts.append(box(middle - 110, 358, 220, 28, "post_attention_layernorm", GREY))
    for name, x in (("gate_proj", middle - 90), ("up_proj", middle + 90)):
        parts += [line((middle, 386), (middle, 393), (x, 393), (x, 402), arrow=True),
                  box(x - 62, 404, 124, 42, name, BLUE, below="(T, F)"),
                  line((x, 446), (x, 458), arrow=True)]
    parts += [box(middle - 152, 460, 304, 28, "silu(gate) ⊙ up", ORANGE),
              line((middle, 488), (middle, 502), arrow=True),
              box(middle - 90, 504, 180, 42, "down_proj", BLUE, below="(T, F) → (T, D)"),
              line((middle - 90, 538), (stream + 12, 538), arrow=True), circle(stream, 538, "+"),
              line((stream, 550), (stream, 588), arrow=True),
              text(stream + 14, 592, "x  (T, D), to the next layer", 14)]
    return document(870, 604, "The decoder, and one of its layers with the shape of every tensor: "
                    "attention and feed-forward each add to the stream x", parts)


def family():
    """LoRA, DoRA and VeRA as what is added beside a frozen weight."""
    d, r = 1024, 16
    kinds = [("LoRA", "y = W x + s B A x", 2 * d * r),
             ("DoRA", "y = m ⊙ (V x) / ‖V‖,  V = W + s B A", 2 * d * r + d),
             ("VeRA", "y = W x + b ⊙ B (d ⊙ A x)", d + r)]
    parts = []
    for n, (name, equation, trained) in enumerate(kinds):
        x0 = 10 + n * 288
        weight, side = x0 + 72, x0 + 202  # the middles of the two ways from x to y
        parts += [text(x0 + 136, 24, name, 17, "middle", weight=600),
                  text(x0 + 136, 46, equation, 13, "middle"),
                  rectangle(x0, 58, 274, 340, "none", INK, dashed=True, round=8)]
        parts += [text(weight, 388, "x", 15, "middle", weight=600),
                  line((weight, 372), (weight, 292), arrow=True),
                  line((weight, 358), (side, 358), (side, 344), arrow=True),
                  box(weight - 55, 180, 110, 110, "W", GREY, 20, below="frozen"),
                  line((weight, 180), (weight, 150), arrow=True), circle(weight, 138, "+"),
                  line((weight, 126), (weight, 88), arrow=True),
                  text(weight, 80, "y", 15, "middle", weight=600)]
        if name == "VeRA":
            thin = [(312, 342, "A", GREY, 62, 26), (284, 302, "d", ORANGE, 30, 30),
                    (242, 274, "B", GREY, 26, 62), (210, 230, "b", ORANGE, 62, 62)]
        else:
            thin = [(276, 342, "A", ORANGE, 62, 20), (196, 262, "B", ORANGE, 20, 62)]
        for top, bottom, label, colour, low, high in thin:
            parts += [polygon((side - low, bottom), (side + low, bottom), (side + high, top),
                              (side - high, top), fill=colour),
                      text(side, (top + bottom) / 2 + 5, label, 15, "middle", "#ffffff", 600)]
        for (above, _, *_), (_, below, *_) in zip(thin, thin[1:]):
            parts.append(line((side, above), (side, below), width=1.5))
        if name != "VeRA":
            parts.append(text(side + 8, 274, "r", 13))
        last = thin[-1][0]
        parts.append(line((side, last), (side, 138), (weight + 12, 138), arrow=True))
        if name == "LoRA":
            parts.append(text(side - 6, 130, "· s", 13, "end"))
        if name == "DoRA":
            parts += [text(side - 6, 130, "· s", 13, "end"),
                      box(weight - 62, 96, 124, 22, "rows ÷ ‖V‖, · m", ORANGE, 12)]
        if name == "VeRA":
            parts.append(text(side, 374, "A, B: one pair for all", 12, "middle"))
        parts.append(text(x0 + 136, 420, f"trained: {trained:,} numbers", 14, "middle"))
    parts += [rectangle(255, 438, 14, 14, ORANGE, round=3), text(275, 450, "trained", 13),
              rectangle(345, 438, 14, 14, GREY, round=3), text(365, 450, "frozen", 13),
              text(430, 450, f"a square layer, {d} wide, r = {r}", 13)]
    return document(870, 464, "LoRA, DoRA and VeRA side by side: which numbers beside a frozen "
                    "weight are trained", parts)
