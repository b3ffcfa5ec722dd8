"""Predicted and measured time and memory of a step: what is counted, and where it is put."""

import gzip
import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from ch3_models import build, pack_of, write_half
from helpers import ROOT, load
from live_memory import LivePeak
from torch.autograd import DeviceType

from common import predict
from common.errors import UserError

buckets = load("chapter-03/profiling/buckets.py")
operators = load("chapter-03/profiling/operators.py")
anatomy = load("chapter-03/profiling/anatomy.py")
profile_step = load("chapter-03/profiling/profile_step.py")
lora = load("chapter-03/lora.py")

CPU = torch.device("cpu")


def one_step(model, pack, method="full"):
    adapter = lora.AdapterConfig(method=method, rank=4, alpha=8.0)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    return profile_step.step_of(model, optimizer, pack, adapter, 1.0), optimizer


# --- buckets ---

@pytest.mark.parametrize("names, expected", [
    (["aten::mm", "aten::linear", "forward", "step"], "matrix products"),
    (["aten::mm", "_ChunkedCrossEntropy", "loss", "step"], "matrix products"),
    (["aten::exp_", "_ChunkedCrossEntropy", "loss", "step"], "loss"),
    (["aten::mul", "_ChunkedCrossEntropyBackward", "backward", "step"], "loss"),
    (["aten::nll_loss_backward", "NllLossBackward0", "backward", "step"], "loss"),
    (["aten::bmm", "bareloop::block_attention", "forward", "step"], "attention"),
    (["aten::_flash_attention_backward", "backward"], "attention"),
    (["aten::silu", "forward", "step"], "element-wise"),
    (["aten::addmm_", "optimizer", "step"], "optimizer"),
    (["aten::_fused_adamw_", "Optimizer.step#AdamW.step", "step"], "optimizer"),
    (["## Call CompiledFxGraph f00 ##", "CompiledFunction", "forward"], "element-wise"),
    (["aten::mm", "## Call CompiledFxGraph f00 ##", "forward"], "matrix products"),
    (["MmBackward0", "backward", "step"], "idle"),
    (["autograd::engine::evaluate_function: MmBackward0", "backward"], "idle"),
    (["forward", "step"], "idle"),
])
def test_bucket_by_name_and_surroundings(names, expected):
    assert buckets.bucket(names) == expected


def test_kernels_on_a_gpu_count_where_they_were_started():
    """Inductor starts Triton's under their own names, which are no operators'."""
    def event(name, above, kernels=0.0, whole=0.0):
        return SimpleNamespace(name=name, cpu_parent=above, device_type=DeviceType.CPU,
                               self_device_time_total=1e6 * kernels, cpu_time_total=1e6 * whole)

    step = event("step", None, whole=20.0)
    forward, loss = event("forward", step), event("loss", step)
    graphs = [event("## Call CompiledFxGraph f0 ##", region) for region in (forward, loss)]
    events = [step, forward, loss, *graphs, event("triton_poi_fused_mul_0", graphs[0], 2.0),
              event("triton_red_fused_exp_sum_0", graphs[1], 3.0),
              event("aten::mm", graphs[0], 4.0), event("aten::mm", loss, 1.0),
              event("torch_attn::_varlen_attn", graphs[0], 0.5),
              event("Optimizer.step#AdamW.step", step, 0.25)]
    assert buckets.sum_up(events, torch.device("cuda")) == {
        "matrix products": 5.0, "attention": 0.5, "loss": 3.0, "element-wise": 2.0,
        "optimizer": 0.25, "idle": 9.25}


def test_a_timeline_is_written_before_the_next_run(tmp_path, monkeypatch):
    """On a GPU it is empty afterwards. That of the run of median length is kept, the first apart."""
    profiles, lengths = [], iter([1.0, 9.0, 2.0, 5.0])

    class Profile:
        def __enter__(self):
            assert all(one.written for one in profiles)
            profiles.append(self)
            self.written = False
            return self

        def __exit__(self, *error):
            self.length = next(lengths)

        def events(self):
            return self.length

        def export_chrome_trace(self, path):
            self.written = True
            open(path, "w").write(str(self.length))

    monkeypatch.setattr(buckets, "profile", Profile)
    monkeypatch.setattr(buckets, "sum_up", lambda length, device: {"idle": length})
    assert buckets.measure(lambda: None, CPU, tmp_path / "trace.json.gz") == {"idle": 5.0}
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json.gz"]
    assert (tmp_path / "trace.json.gz").read_text() == "5.0"


@pytest.mark.parametrize("base, method", [("dense", "full"), ("nf4", "lora")])
def test_every_operator_is_in_one_bucket_and_they_add_up(base, method):
    model, pack = build(base, method), pack_of([40, 9, 30])
    step, _ = one_step(model, pack, method)
    step()
    with torch.profiler.profile() as profiler, buckets.region("step"):
        step()
    events = profiler.events()
    times = buckets.sum_up(events, CPU)
    (whole,) = (event for event in events if event.name == "step")
    assert tuple(times) == buckets.BUCKETS and all(seconds > 0 for seconds in times.values())
    assert sum(times.values()) == pytest.approx(whole.cpu_time_total / 1e6, rel=1e-6)
    own = sum(event.self_cpu_time_total for event in events) / 1e6
    assert sum(times.values()) == pytest.approx(own, rel=1e-3)  # nothing ran outside of "step"


def test_figures_stand_beside_their_difference(capsys):
    profile_step.show("numbers", ("roofline", "alone", "measured", "rest"),
                      {"attention": (0, 1, 0.5), "loss": (1, 2, 2.5)}, "step", str)
    title, attention, loss, total = map(str.split, capsys.readouterr().out.strip().splitlines())
    assert title == ["numbers", "roofline", "alone", "measured", "rest"]
    assert attention == ["attention", "0", "1", "0.5", "-0.5"]
    assert total == ["step", "1", "3", "3.0", "0.0"]


# --- predicted operators ---

@pytest.mark.parametrize("method, checkpointing", [("full", "none"), ("full", "full"),
                                                   ("lora", "none")])
def test_recorded_products_have_the_models_flops(method, checkpointing):
    """All that common/predict.py counts, and with checkpointing the layers' forward once more."""
    model, pack = build("dense", method), pack_of([50, 20, 31])
    for layer in model.model.layers:
        layer.checkpointing = checkpointing
    ops = operators.record(model, pack)
    flops, tokens = predict.flops_per_token(model, 1), len(pack["labels"])
    labelled = int((pack["labels"] >= 0).sum())
    expected = flops["matrices"] * tokens + flops["head"] * labelled
    if checkpointing == "full":
        down = sum(layer.mlp.down_proj.weight.numel() for layer in model.model.layers)
        expected += flops["matrices"] * tokens / 3 - 2 * tokens * down  # whose output none keeps
    if method == "lora":  # below the first layer's q, k and v nothing is trained
        attention = model.model.layers[0].self_attn
        for module in (attention.q_proj, attention.k_proj, attention.v_proj):
            expected -= 2 * tokens * (module.base.weight.numel() + module.lora_A.numel())
    assert sum(op.flops for op in ops) == expected
    calls = [op.name for op in ops if op.bucket == "attention"]
    assert calls.count("bareloop::block_attention") == 3 * (1 + (checkpointing == "full"))
    assert calls.count("bareloop::block_attention_backward") == 3


def test_attention_is_predicted_by_the_window_of_each_layer(monkeypatch):
    seconds = {None: (1.0, 10.0), 7: (0.1, 2.0)}
    monkeypatch.setattr(operators, "attention", lambda model, pack, window: seconds[window])
    monkeypatch.setattr(operators, "ceilings", lambda device, dtype: (1e9, 1e9))
    lengths, kinds = [50, 20, 3], ["sliding_attention", "full_attention", "sliding_attention"]
    model = build("dense", use_sliding_window=True, sliding_window=7, layer_types=kinds)
    roofline, alone = operators.predict(model, pack_of(lengths))["attention"]
    assert alone == pytest.approx(1 + 10 + 2 * (0.1 + 2))
    # Seven products, of which predict.py does not count the scores that the backward makes again.
    counted = predict.flops_per_token(model, lengths)["attention"] * sum(lengths)
    assert roofline == pytest.approx(counted * 7 / 6 / 1e9)


def test_recording_computes_nothing_and_leaves_no_trace():
    model, pack = build("nf4", "lora"), pack_of([50, 20])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    operators.record(model, pack)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert all(type(p) is torch.nn.Parameter for p in model.parameters())
    assert not buckets.open_regions
    assert model(**pack).isfinite()


def test_fused_reads_once_and_writes_what_is_needed():
    """y = f(g(x)) between two products: g(x) is neither written nor read, if nobody else wants."""
    def op(kind, reads, writes):
        return operators.Op("op", kind, None, 0, dict.fromkeys(reads, 10), dict.fromkeys(writes, 10))

    product = op("matrix products", ["y"], ["z"])
    chain = [op("element-wise", ["x", "w"], ["g"]), op("element-wise", ["g"], ["y"])]
    first, last = operators.fused([*chain, product])
    assert (set(first.reads), set(first.writes), last) == ({"x", "w"}, {"y"}, product)
    first, *_ = operators.fused([*chain, product, op("matrix products", ["g"], ["r"])])
    assert set(first.writes) == {"y", "g"}
    (whole,) = operators.fused(chain)
    assert (set(whole.reads), set(whole.writes)) == ({"x", "w"}, {"y"})  # y is the result


def test_an_operator_is_measured_on_its_own_layout():
    """Of a transposed factor, strides and values that are valid indices."""
    recorder = operators.Recorder()
    with recorder:
        torch.rand(64, 32).t() @ torch.rand(64, 8)
        torch.nn.functional.embedding(torch.tensor([3, 1]), torch.rand(5, 4))
        torch.rand(1000).exp_()
    calls = {op.name: op.call for op in recorder.ops}
    layout = calls["aten::mm"][1][0]
    assert (layout.shape, layout.stride) == ((32, 64), (1, 32))
    for name in ("aten::mm", "aten::embedding", "aten::exp_"):
        assert 0 < operators.alone(CPU, *calls[name]) < 0.1


@pytest.mark.slow
def test_the_ceilings_of_this_device():
    for dtype in (torch.float32, torch.bfloat16):
        flops, bandwidth = operators.ceilings(CPU, dtype)
        assert 1e8 < flops < 1e14 and 1e8 < bandwidth < 1e13


def test_duration_is_the_median():
    waits = iter([0, 0.002, 0.03, 0.002, 0.002, 0.05])
    assert 0.002 <= buckets.duration(lambda: time.sleep(next(waits)), CPU) < 0.02


# --- memory ---

def test_measured_memory_is_the_live_peak():
    model, pack = build("dense", "full", hidden_size=128), pack_of([60, 50])
    step, optimizer = one_step(model, pack)
    step()
    found = anatomy.measured(step, model, optimizer, CPU)
    own = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert found["weights"] == own and found["quantised base"] == 0
    with LivePeak() as live:
        step()
    assert sum(found.values()) - own - found["optimizer"] == pytest.approx(live.grown, rel=0.05)


def test_where_memory_is_born_and_when_it_dies_says_what_it_is():
    spans = {"forward": (0, 10), "loss": (10, 20), "backward": (20, 30), "optimizer": (30, 40)}
    for born, died, expected in [(5, 25, "activations"), (12, 22, "logits and loss"),
                                 (21, 29, "activations"), (21, 35, "gradients"),
                                 (31, 33, "optimizer"), (22, float("inf"), "gradients")]:
        assert anatomy.category(born, died, spans) == expected


def test_quantised_base_is_told_from_the_rest():
    model = build("nf4", "lora")
    sizes = anatomy.predicted(model, predict.Prediction({"weights": 10**7, "layer at work": 5}))
    base = [m for m in model.modules() if isinstance(m, anatomy.NF4Linear)]
    assert sizes["quantised base"] == sum(m.quantized.nbytes for m in base) > 0
    assert sizes["weights"] + sizes["quantised base"] == 10**7 and sizes["activations"] == 5


# --- the script ---

def test_it_leaves_what_it_says(tmp_path, capsys, quick_ceilings):
    out = tmp_path / "out"
    arguments = [
        "--model", str(write_half(tmp_path)), "--data", "virtual", "--init", "random", "--device",
        "cpu", "--dtype", "float32", "--batch-tokens", "256", "--out", str(out)]
    assert profile_step.main(arguments) == 0
    printed = capsys.readouterr().out
    trace = json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"step", "forward", "loss", "backward", "optimizer"} <= names
    figures = json.loads((out / "profile.json").read_text(encoding="utf-8"))
    assert list(figures["measured"]) == list(figures["predicted"]) == list(buckets.BUCKETS)
    # A bucket that is too slow does not make up for one that is too fast.
    differences = [abs(seconds - alone) for seconds, (_, alone) in zip(
        figures["measured"].values(), figures["predicted"].values())]
    assert figures["explained"] == pytest.approx(
        1 - sum(differences) / sum(figures["measured"].values()))
    predicted, measured = (sum(figures[key].values())
                           for key in ("predicted_bytes", "measured_bytes"))
    assert predicted == pytest.approx(measured, rel=0.1)
    for words in ("GFLOP/s in a large float32 product", "explained", "trace.json.gz: the timeline",
                  "perfetto", *buckets.BUCKETS, *anatomy.CATEGORIES):
        assert words in printed
    assert os.listdir(out) and "snapshot" not in printed
    with pytest.raises(UserError, match="choose another --out"):
        profile_step.main(arguments)


def test_script_refuses_what_is_no_step():
    with pytest.raises(UserError, match="--quantize none"):
        profile_step.main(["--model", "tiny", "--data", "virtual", "--device", "cpu",
                           "--method", "full"])
    with pytest.raises(UserError, match="--dry-run"):
        profile_step.main(["--model", "tiny", "--data", "virtual", "--device", "cpu", "--dry-run"])


def test_mid_is_the_size_that_readmes_speak_of():
    config = json.loads((ROOT / "chapter-03/profiling/mid/config.json").read_text(encoding="utf-8"))
    assert [config[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")] == [
        16384, 512, 8]
