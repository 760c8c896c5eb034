"""Predict the masks of images from a checkpoint alone.

python src/predict.py runs/NAME/checkpoints/best.ckpt photos/ predicted/
python src/predict.py runs/NAME/checkpoints/best.ckpt "scans/**/*.tif" predicted/ --format palette --overlay --tta
python src/predict.py runs/NAME/checkpoints/best.ckpt slide.tif predicted/ --tile 1024
python src/predict.py runs/fold-0/checkpoints/best.ckpt photos/ predicted/ --ensemble runs/fold-1/checkpoints/best.ckpt

The same command goes on where it was stopped: images that have their mask are left out.
"""

from segmentation.training.entry import run_job

if __name__ == "__main__":
    run_job("segmentation.inference.predict:predict")
