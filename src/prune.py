"""Cut a UNet++ that was trained with deep supervision to one of its levels L1..L4.

python src/prune.py runs/NAME/checkpoints/best.ckpt                  what each level costs and reaches
python src/prune.py runs/NAME/checkpoints/best.ckpt --level 2        the checkpoint of one: best_L2.ckpt
"""

from segmentation.errors import run_job

if __name__ == "__main__":
    run_job("segmentation.inference.pruning:prune")
