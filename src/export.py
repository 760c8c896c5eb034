"""Write a trained net as one file that runs without this project.

python src/export.py runs/NAME/checkpoints/best.ckpt --format onnx
python src/export.py runs/NAME/checkpoints/best.ckpt --format torch_export --output model.pt2
"""

from segmentation.errors import run_job

if __name__ == "__main__":
    run_job("segmentation.inference.exporting:export")
