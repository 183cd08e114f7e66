"""Write a randomly initialised Llama-architecture model folder: what `pretrain.yaml` starts from.

python scripts/embedded/init_model.py --tokenizer build/embedded/tokenizer --out build/embedded/init
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 20260801


def main() -> None:
    """Build, count, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer files and config.json")
    parser.add_argument("--out", type=Path, required=True, help="new model folder")
    options = parser.parse_args()
    config = LlamaConfig(**json.loads((options.tokenizer / "config.json").read_text(encoding="utf-8")))
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    # Residual projections start smaller with depth (GPT-2, sec. 2.3), so that deep thin stacks train at high rates.
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            with torch.no_grad():
                parameter.mul_((2 * config.num_hidden_layers) ** -0.5)
    options.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.out)
    for file in options.tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "generation_config", "chat_template")):
            shutil.copyfile(file, options.out / file.name)
    print(f"{options.out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
