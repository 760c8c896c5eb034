"""Cut a UNet++ that was trained with deep supervision to one of its levels L1..L4.

python src/prune.py runs/NAME/checkpoints/best.ckpt                     what each level costs and reaches
python src/prune.py runs/NAME/checkpoints/best.ckpt --level 2           best_L2.ckpt, at once
python src/prune.py runs/NAME/checkpoints/best.ckpt --max-ms 20         the best that takes 20 ms at most, here
python src/prune.py runs/NAME/checkpoints/best.ckpt --max-drop 0.01     the smallest that loses 0.01 mIoU at most

Any option of data and trainer, as in train.py: --data.num_workers 0 --trainer.accelerator cpu
"""

from segmentation.training.entry import run_job

if __name__ == "__main__":
    run_job("segmentation.inference.prune:prune")
