"""What merging has cost: of ΔW, by layer, and in the logits of a sample prompt."""


def summary(norms):
    """Part of the report: what `merge_into` gave."""
    return {"layers": {name: relative([pair]) for name, pair in norms.items()},
            "total": relative(norms.values()), "delta": sum(d for d, _ in norms.values()) ** 0.5}


def relative(pairs):
    """‖error‖ / ‖ΔW‖ over several layers, from their squares; 0 where nothing was to be added."""
    delta, error = (sum(column) for column in zip(*pairs))
    return (error / delta) ** 0.5 if delta else 0.0


def compared(before, after):
    """Part of the report: two models' logits (T, V)."""
    return {"logit_difference": (after - before).abs().max().item(),
            "largest_logit": before.abs().max().item(), "tokens": len(before),
            "tokens_changed": int((before.argmax(-1) != after.argmax(-1)).sum())}


def show(report):
    """Print what the rounding has cost, by decoder layer and in all."""
    print(f"error of the merged ΔW after rounding to {report['dtype']}, relative to ΔW\n"
          "(0: all of it survived, 1: as far off as without the adapter)")
    groups = {}
    for name, error in report["layers"].items():
        group = f"layer {name.split('.')[2]}" if name.startswith("model.layers.") else name
        groups.setdefault(group, []).append((error, name))
    for group, members in groups.items():
        error, name = max(members)
        print(f"  {group:<10} worst {error:9.2e}  {name}")
    print(f"  all layers       {report['total']:9.2e}")
    if not report["delta"]:
        print("  every ΔW is zero: has this adapter been trained?")
    print(f"on a sample prompt of {report['tokens']} tokens: largest logit difference "
          f"{report['logit_difference']:.2e}\n(largest logit {report['largest_logit']:.1f}), "
          f"likeliest next token another at {report['tokens_changed']}")
