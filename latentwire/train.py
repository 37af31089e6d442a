"""One training run on this machine: ``latentwire train`` with the same flags.

    python3 latentwire/train.py --samples 100 --epochs 1 --batch_size 4 --output_dir runs/test
    python3 latentwire/train.py --llama_id meta-llama/Meta-Llama-3.1-8B-Instruct --qwen_id Qwen/Qwen2.5-7B-Instruct \\
      --dataset squad --samples 87599 --epochs 24 --batch_size 64 --latent_len 32 --d_z 256 --sequential_models \\
      --warm_anchor_text "Answer: " --first_token_ce_weight 0.5 --output_dir runs/experiment_name
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This folder would come first, and its evaluate.py hide Hugging Face's package.
    sys.path[0] = str(Path(__file__).parents[1])
    from latentwire.cli import as_written, main

    sys.exit(main(["train", *as_written(sys.argv[1:])]))
