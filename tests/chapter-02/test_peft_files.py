"""PEFT's own adapters (goldens) read here, ours written as PEFT has them, and what is refused."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import GOLDENS, load
from safetensors.torch import load_file, save_file

from common import weights
from common.adapters import peft
from common.errors import UserError
from common.files.checkpoint import MARK

llama = load("chapter-02/modeling_llama.py")
lora = load("chapter-02/lora.py")

PEFT = GOLDENS / "peft"
ABOUT = json.loads((PEFT / "about.json").read_text())
LOGITS = load_file(PEFT / "logits.safetensors")
CASES = ABOUT["cases"]
METHODS = {"lora": "lora", "rslora": "rslora", "dora": "dora", "dora-bias": "dora", "vera": "vera",
           "vera-seed": "vera", "regex": "lora", "pissa": "lora", "pissa-raw": "pissa",
           "head": "lora"}
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ALL = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def base_model(name="qwen3"):
    config = weights.read_config(PEFT / name)
    model = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(config)).eval()
    weights.load_weights(model, PEFT / name)
    return model


@torch.no_grad()
def logits_of(model):
    documents = ABOUT["documents"]
    lengths = [len(ids) for ids in documents]
    return model(
        input_ids=torch.tensor(sum(documents, [])),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(), max_seqlen=max(lengths),
        position_ids=torch.cat([torch.arange(length) for length in lengths]))


def same(logits, expected, tolerance=1e-5):
    error = (logits - expected).abs().max().item()
    assert error <= tolerance, f"off by {error:.1e}"


def trained(method, **options):
    """(base model with random adapters, its config): as if it had been trained."""
    model = base_model()
    options = {"method": method, "rank": 4, "alpha": 10.0, "seed": 3, **options}
    config = lora.AdapterConfig(**options)
    lora.apply_adapter(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, layer in lora.adapter_modules(model):
            for parameter in layer.parameters(recurse=False):
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model, config


def save(model, config, path, **options):
    peft.save_adapter(model, config, path, "some/model", lora, **options)
    return json.loads((path / "adapter_config.json").read_text()), load_file(
        path / "adapter_model.safetensors")


# --- PEFT's files, read here ---

@pytest.mark.parametrize("name, base", [(base, base) for base in sorted(set(CASES.values()))])
def test_the_base_models_agree(name, base):
    same(logits_of(base_model(base)), LOGITS[name])


@pytest.mark.parametrize("case", CASES)
def test_adapters_made_by_peft_give_its_logits(case, capsys):
    model = base_model(CASES[case])
    config = peft.load_adapter(model, PEFT / case, lora)
    assert config.method == METHODS[case]
    same(logits_of(model), LOGITS[case])
    assert (LOGITS[case] - LOGITS[CASES[case]]).abs().max() > 0.1  # the adapter does something
    assert capsys.readouterr().err == ""
    assert peft.base_model_name(PEFT / case) == CASES[case]


@pytest.mark.parametrize("case", CASES)
def test_adapters_made_by_peft_merge_to_its_logits(case):
    model = base_model(CASES[case])
    peft.load_adapter(model, PEFT / case, lora)
    for name, layer in list(lora.adapter_modules(model)):
        parent, _, attribute = name.rpartition(".")
        layer.base.weight.data.copy_(layer.merged())
        setattr(model.get_submodule(parent), attribute, layer.base)
    same(logits_of(model), LOGITS[case])


def copy_of(case, tmp_path, edit=None, tensors=None):
    """A folder like PEFT's, with adapter_config.json or the tensors changed by a function."""
    folder = tmp_path / case
    shutil.copytree(PEFT / case, folder)
    for name, change, read, write in (
            ("adapter_config.json", edit, lambda f: json.loads(f.read_text()),
             lambda value, f: f.write_text(json.dumps(value))),
            ("adapter_model.safetensors", tensors, load_file, save_file)):
        if change is not None:
            value = read(folder / name)
            changed = change(value)
            write(value if changed is None else changed, folder / name)
    return folder


@pytest.mark.parametrize("case, options", [
    ("lora", {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": list(ALL)}),
    ("lora", {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": "all-linear"}),
    ("lora", {"peft_type": "LORA", "r": 4, "lora_alpha": 16,
              "target_modules": [*ALL, "not_in_this_family"]}),
    ("regex", {"peft_type": "LORA", "r": 3, "target_modules": [  # and no lora_alpha: that is 8
        "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]}),
    ("rslora", {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True,
                "target_modules": list(ALL)}),
    ("dora", {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True,
              "target_modules": list(ALL)}),
    ("vera", {"peft_type": "VERA", "r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    ("vera-seed", {"peft_type": "VERA", "r": 4, "target_modules": list(ALL),
                   "save_projection": False, "projection_prng_key": 11})])
def test_the_smallest_configs(case, options, tmp_path):
    model = base_model()
    peft.load_adapter(model, copy_of(case, tmp_path, lambda _: options), lora)
    same(logits_of(model), LOGITS[case])


def test_veras_matrices_are_pefts_to_the_bit():
    saved = load_file(PEFT / "vera" / "adapter_model.safetensors")
    model = lora.apply_adapter(base_model(), lora.AdapterConfig(
        method="vera", rank=4, seed=7, target_modules="q_proj,v_proj,down_proj"))
    shared = next(lora.adapter_modules(model))[1].shared
    assert torch.equal(shared.vera_A, saved["base_model.vera_A"])
    assert torch.equal(shared.vera_B, saved["base_model.vera_B"])


def test_veras_saved_matrices_win_over_the_seed(tmp_path):
    def double(tensors):
        tensors["base_model.vera_B"] *= 2
    model = base_model()
    peft.load_adapter(model, copy_of("vera", tmp_path, tensors=double), lora)
    halved = base_model()
    peft.load_adapter(halved, PEFT / "vera", lora)
    for _, layer in lora.adapter_modules(halved):
        layer.vera_lambda_b.data *= 2
    same(logits_of(model), logits_of(halved))
    assert (logits_of(model) - LOGITS["vera"]).abs().max() > 0.01


def test_tensors_in_16_bits_are_loaded_as_float32(tmp_path):
    model = base_model()
    peft.load_adapter(model, copy_of("lora", tmp_path, tensors=lambda tensors: {
        name: tensor.bfloat16() for name, tensor in tensors.items()}), lora)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    same(logits_of(model), LOGITS["lora"], 0.2)


# --- what is refused ---

@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(LORA), f"missing {LORA}"),
    (lambda t: t.update({"extra.weight": torch.ones(2)}), "unexpected extra.weight"),
    (lambda t: t.update({LORA: torch.ones(5, 32)}), r"has shape \(5, 32\), not \(4, 32\)"),
    (lambda t: t.update({LORA: torch.ones(4, 32, dtype=torch.int32)}), "is I32, not BF16 or F16"),
    (lambda t: {k.replace("lora_A", "lora_A.default"): v for k, v in t.items()},
     "missing .* 11 more; unexpected .*lora_A.default.weight"),
    (lambda t: {k: v for k, v in t.items() if "layers.1" not in k}, "missing .*layers.1")])
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    folder = copy_of("lora", tmp_path, tensors=lambda t: (
        value if isinstance(value := change(t), dict) else None))
    with pytest.raises(UserError, match=message):
        peft.load_adapter(base_model(), folder, lora)


@pytest.mark.parametrize("option, value", [
    ("modules_to_save", ["lm_head"]), ("layers_to_transform", [0]), ("rank_pattern", {"q_proj": 2}),
    ("alpha_pattern", {"q_proj": 2}), ("fan_in_fan_out", True), ("lora_bias", True),
    ("bias", "all"), ("bias", "lora_only"), ("exclude_modules", ["q_proj"]),
    ("layer_replication", [[0, 1]]), ("trainable_token_indices", [1]), ("use_qalora", True),
    ("target_parameters", ["x"]), ("alora_invocation_tokens", [1]), ("peft_type", "IA3"),
    ("peft_type", None), ("init_lora_weights", "olora"), ("init_lora_weights", "loftq"),
    ("init_lora_weights", "pissa_niter_16"), ("r", 0), ("r", "4"), ("lora_alpha", "x"),
    ("lora_dropout", 2), ("target_modules", ["nothing"]), ("target_modules", "(")])
def test_options_that_are_not_implemented_are_named(option, value, tmp_path):
    folder = copy_of("lora", tmp_path, lambda options: options.update({option: value}))
    name = {"r": "--rank", "lora_alpha": "--alpha", "lora_dropout": "--dropout",
            "target_modules": "--target-modules"}.get(option, option)
    with pytest.raises(UserError, match=name):
        peft.load_adapter(base_model(), folder, lora)


EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"


@pytest.mark.parametrize("chapter", ["chapter-02", "chapter-03"])
def test_pefts_copies_of_embedding_and_head_must_be_the_models(chapter, tmp_path):
    """What PEFT 0.21 adds: `base_layer` where the head is a target, the others if asked to, or
    where the vocabulary was resized."""
    model_file, methods = load(f"{chapter}/modeling_llama.py"), load(f"{chapter}/lora.py")
    own = load_file(PEFT / "qwen3" / "model.safetensors")
    own = {EMBEDDING: own["model.embed_tokens.weight"], HEAD: own["lm_head.weight"]}
    both = {f"{name}.weight": tensor for name, tensor in own.items()}
    assert torch.equal(load_file(PEFT / "head" / "adapter_model.safetensors")[
        f"{HEAD}.base_layer.weight"], own[HEAD])

    def load_into(dtype, folder):
        config = weights.read_config(PEFT / "qwen3")
        model = model_file.LlamaForCausalLM(model_file.LlamaConfig.from_dict(config)).to(dtype)
        weights.load_weights(model, PEFT / "qwen3")
        peft.load_adapter(model.eval(), folder, methods)
        return model

    def folder_with(name, case="lora", **tensors):
        return copy_of(case, tmp_path / str(name), tensors=lambda old: {**old, **tensors})

    model = load_into(torch.float32, folder_with("same", **both))
    same(logits_of(model), LOGITS["lora"])
    load_into(torch.bfloat16, folder_with("rounded base", **both))
    load_into(torch.float32, folder_with("rounded copy", **{
        key: tensor.bfloat16() for key, tensor in both.items()}))

    for number, (key, tensor) in enumerate((
            (f"{EMBEDDING}.weight", own[EMBEDDING] * 1.02), (f"{HEAD}.weight", own[HEAD] * 1.02),
            (f"{HEAD}.base_layer.weight", own[HEAD] * 1.02))):
        folder = folder_with(number, "head" if "base_layer" in key else "lora", **{key: tensor})
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(UserError, match=f"{key} is not the base model's.*merge_and_unload"):
                load_into(dtype, folder)
    for rows in (70, 60):
        resized = {f"{name}.weight": torch.ones(rows, 32) for name in own}
        resized[f"{HEAD}.lora_B.weight"] = torch.ones(rows, 2)
        folder = folder_with(rows, "head", **resized)
        with pytest.raises(UserError, match=rf"embed_tokens.weight has shape \({rows}, 32\), not"
                           r" \(64, 32\).*: .*resized, .*merge_and_unload.*--model"):
            load_into(torch.float32, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pefts_copies_are_checked_on_a_base_of_four_bits(dtype, tmp_path):
    llama3, lora3 = load("chapter-03/modeling_llama.py"), load("chapter-03/lora.py")
    base_model = load("chapter-03/quantized_model.py").base_model

    def load_into(folder):
        config = llama3.LlamaConfig.from_dict(weights.read_config(PEFT / "qwen3"))
        peft.load_adapter(base_model(config, PEFT / "qwen3", dtype), folder, lora3)

    load_into(PEFT / "head")
    changed = copy_of("head", tmp_path, tensors=lambda tensors: {
        key: tensor * 1.02 for key, tensor in tensors.items()})
    with pytest.raises(UserError, match="lm_head.base_layer.weight is not the base model's"):
        load_into(changed)


def test_a_tied_models_head_is_copied_by_its_embedding_and_takes_no_adapter(tmp_path):
    config = weights.read_config(PEFT / "qwen3") | {"tie_word_embeddings": True}
    model = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(config))
    embedding = model.model.embed_tokens.weight.data
    copies = {f"{name}.weight": embedding.clone() for name in (HEAD, EMBEDDING)}
    peft.load_adapter(model, copy_of("lora", tmp_path, tensors=lambda t: {**t, **copies}), lora)
    model = llama.LlamaForCausalLM(llama.LlamaConfig.from_dict(config))
    with pytest.raises(UserError, match="adapter_config.json: .*lm_head cannot be adapted in this"):
        peft.load_adapter(model, PEFT / "head", lora)


def test_an_option_of_tomorrow_is_said_to_be_ignored(tmp_path, capsys):
    folder = copy_of("lora", tmp_path, lambda o: o.update(use_novelty=True, use_other=None))
    peft.load_adapter(base_model(), folder, lora)
    assert "use_novelty=True is unknown here and ignored" in (err := capsys.readouterr().err)
    assert "use_other" not in err


@pytest.mark.parametrize("case, name", [("lora", "lora_B"), ("vera", "vera_lambda_b")])
def test_an_adapter_of_zeros_is_said_to_be_one(case, name, tmp_path, capsys):
    folder = copy_of(case, tmp_path, tensors=lambda tensors: {
        key: tensor * (name not in key) for key, tensor in tensors.items()})
    peft.load_adapter(base_model(), folder, lora)
    assert f"every {name} is zero" in capsys.readouterr().err


def test_folders_that_are_no_adapters(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        peft.load_adapter(base_model(), tmp_path / "nowhere", lora)
    with pytest.raises(UserError, match="no adapter_config.json here"):
        peft.load_adapter(base_model(), PEFT / "qwen3", lora)
    copy_of("lora", tmp_path).rename(tmp_path / "final")
    with pytest.raises(UserError, match="did you mean .*final"):  # the run, not what it wrote
        peft.load_adapter(base_model(), tmp_path, lora)
    folder = copy_of("lora", tmp_path)
    (folder / "adapter_config.json").write_text('{"r": 4,\n"lora_alpha": }')
    with pytest.raises(UserError, match="adapter_config.json: not valid JSON: .*line 2"):
        peft.load_adapter(base_model(), folder, lora)


def test_a_pickle_is_never_read(tmp_path):
    folder = copy_of("lora", tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="only pickled weights here, which are never read"):
        peft.load_adapter(base_model(), folder, lora)


def test_damage_is_noticed(tmp_path):
    folder = copy_of("lora", tmp_path)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        peft.load_adapter(base_model(), folder, lora)
    model, config = trained("lora")
    save(model, config, tmp_path / "marked", metadata=MARK)
    with pytest.raises(UserError, match="manifest.json: missing"):
        peft.load_adapter(base_model(), tmp_path / "marked", lora)


# --- our files ---

@pytest.mark.parametrize("method", [m for m in lora.METHODS if m not in ("full", "delta-lora")])
def test_what_was_saved_reloads_to_the_live_logits(method, tmp_path):
    model, config = trained(method)
    _, tensors = save(model, config, tmp_path)
    assert all(tensor.any() and tensor.dtype == torch.float32 for tensor in tensors.values())
    fresh = base_model()
    again = peft.load_adapter(fresh, tmp_path, lora)
    expected = logits_of(model)
    if method == "pissa":
        same(logits_of(fresh), expected)
        assert again.method == "lora"
    else:
        assert torch.equal(logits_of(fresh), expected)
        assert again.method == {"lora+": "lora", "lora-fa": "lora"}.get(method, method)
    assert (expected - LOGITS["qwen3"]).abs().max() > 0.1


def test_the_files_contents(tmp_path):
    """Field by field what PEFT needs: reading in PEFT was checked by hand with the same files."""
    common = {"base_model_name_or_path": "some/model", "bias": "none", "fan_in_fan_out": False,
              "inference_mode": True, "modules_to_save": None, "task_type": "CAUSAL_LM",
              "target_modules": list(ALL)}
    plain = common | {"peft_type": "LORA", "r": 4, "lora_alpha": 10, "lora_dropout": 0.0,
                      "init_lora_weights": True, "use_dora": False, "use_rslora": False}
    vera = common | {"peft_type": "VERA", "r": 4, "projection_prng_key": 3, "d_initial": 0.1,
                     "save_projection": True, "vera_dropout": 0.0}
    for method, expected in (
            ("lora", plain), ("lora+", plain), ("lora-fa", plain),
            ("rslora", plain | {"use_rslora": True}), ("dora", plain | {"use_dora": True}),
            ("pissa", plain | {"r": 8, "lora_alpha": 20}), ("vera", vera)):
        model, config = trained(method)
        written, tensors = save(model, config, tmp_path / method)
        assert written == expected, method
        names = {key.replace("base_model.model.model.layers.", "") for key in tensors}
        layers = [f"{i}.{part}" for i in (0, 1) for part in (
            *(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.gate_proj", "mlp.up_proj",
            "mlp.down_proj")]
        parts = {"vera": ["vera_lambda_b", "vera_lambda_d"],
                 "dora": ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]}.get(
                     method, ["lora_A.weight", "lora_B.weight"])
        shared = {"base_model.vera_A", "base_model.vera_B"}
        assert names == {f"{layer}.{part}" for layer in layers for part in parts} | (
            shared if method == "vera" else set())
        if method != "vera":
            assert tensors[LORA].shape == (expected["r"], 32)


def test_header_and_an_alpha_that_is_not_whole(tmp_path):
    from safetensors import safe_open
    """Of rsLoRA written as the LoRA that it is, for programs that know only that."""
    model, config = trained("rslora", rank=3, alpha=5.0)
    folded = replace(config, method="lora", alpha=5 * math.sqrt(3))
    written, _ = save(model, folded, tmp_path)
    assert written["lora_alpha"] == 5 * math.sqrt(3) and not written["use_rslora"]
    fresh = base_model()
    peft.load_adapter(fresh, tmp_path, lora)
    same(logits_of(fresh), logits_of(model))
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("target_modules, written", [
    ("q_proj,v_proj", ["q_proj", "v_proj"]),
    (r".*layers\.0\.mlp\..*", [f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")]),
    (r".*\.up_proj", ["up_proj"]), ("lm_head", ["lm_head"])])
def test_target_modules_are_written_as_names(target_modules, written, tmp_path):
    model, config = trained("lora", target_modules=target_modules)
    assert save(model, config, tmp_path)[0]["target_modules"] == written
    fresh = base_model()
    peft.load_adapter(fresh, tmp_path, lora)
    assert torch.equal(logits_of(fresh), logits_of(model))


@pytest.mark.parametrize("method", ["delta-lora", "full"])
def test_what_changes_the_base_is_no_adapter(method, tmp_path):
    with pytest.raises(UserError, match=f"{method} changes the base weights.*merged"):
        save(*trained(method), tmp_path)


def test_dora_with_rsloras_scale_and_pissa_with_it(tmp_path):
    """PEFT combines them; ours is the same with √r in alpha."""
    folder = copy_of("pissa-raw", tmp_path, lambda options: options.update(use_rslora=True))
    config = peft.load_adapter(base_model(), folder, lora)
    assert (config.method, config.alpha) == ("pissa", 8 * 2.0)
    model = base_model("qwen2")
    config = peft.load_adapter(model, PEFT / "dora-bias", lora)
    assert (config.method, config.alpha) == ("dora", 3 * math.sqrt(2))
