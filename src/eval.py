"""Test a checkpoint: training's own test figures again, to the last digit.

python src/eval.py runs/NAME/checkpoints/best.ckpt
python src/eval.py runs/NAME/checkpoints/best.ckpt --split val --output val.json
python src/eval.py runs/NAME/checkpoints/best.ckpt --surface-distances --ensemble runs/OTHER/checkpoints/best.ckpt
python src/eval.py runs/NAME/checkpoints/best.ckpt --calibrate copy.ckpt --max-missed 0.05 --confidence 0.9
python src/eval.py runs/NAME/checkpoints/best.ckpt --data configs/data/camvid.yaml --trainer.devices 2

Any option of data and trainer, as in train.py: --data.eval_batch_size 1 --trainer.devices 2
"""

from segmentation.training.entry import run_job

if __name__ == "__main__":
    run_job("segmentation.inference.evaluate:evaluate")
