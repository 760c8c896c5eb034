"""Predict the masks of images from a checkpoint alone.

python src/predict.py runs/NAME/checkpoints/best.ckpt photos/ predicted/
python src/predict.py runs/NAME/checkpoints/best.ckpt "scans/**/*.tif" predicted/ --format palette --overlay --tta
"""

from segmentation.errors import run_job

if __name__ == "__main__":
    run_job("segmentation.inference.predicting:predict")
