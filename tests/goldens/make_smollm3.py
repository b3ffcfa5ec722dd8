"""Make tests/goldens/smollm3/: a tiny random SmolLM3 as transformers writes it, and its logits.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/goldens/make_smollm3.py

For tests/test_extensions.py, which adds this family to chapter 2. `answers.safetensors` holds
input_ids (T,) int64, of all documents, lengths (N,) int64, and logits (T, V) float32 of every
document run alone.
"""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "smollm3"
LENGTHS = (7, 1, 12, 5)


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    torch.manual_seed(0)
    config = transformers.SmolLM3Config(
        vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6}, no_rope_layers=[1, 0, 1, 0],
        tie_word_embeddings=True, initializer_range=0.4, bos_token_id=1, eos_token_id=2,
        pad_token_id=None, pretraining_tp=2)
    model = transformers.SmolLM3ForCausalLM(config).eval()
    model.save_pretrained(FOLDER)
    input_ids = torch.randint(0, config.vocab_size, (sum(LENGTHS),))
    with torch.no_grad():
        logits = [model(ids[None]).logits[0] for ids in input_ids.split(LENGTHS)]
    save_file({"input_ids": input_ids, "lengths": torch.tensor(LENGTHS),
               "logits": torch.cat(logits).contiguous()}, FOLDER / "answers.safetensors")
    (FOLDER / "generation_config.json").unlink(missing_ok=True)
    (FOLDER / "versions.json").write_text(json.dumps(
        {"torch": torch.__version__, "transformers": transformers.__version__}) + "\n")


if __name__ == "__main__":
    main()
