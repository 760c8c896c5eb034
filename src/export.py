"""Write a trained net as one file that runs without this project.

python src/export.py runs/NAME/checkpoints/best.ckpt --format onnx
python src/export.py runs/NAME/checkpoints/best.ckpt --format torch_export --output model.pt2
python src/export.py runs/NAME/checkpoints/best.ckpt --quantize int8 --output model.onnx
python src/export.py runs/NAME/checkpoints/best.ckpt --levels all --output levels.onnx

The file takes images as files have them, (N, C, H, W) of any N, H and W over a net's stride, and gives
`logits` (N, K, H, W), float32, and `mask` (N, H, W), class indices. Its metadata says which class is which.
Any option of data, as in train.py: --data.dataset.root FOLDER
"""

from segmentation.training.entry import run_job

if __name__ == "__main__":
    run_job("segmentation.inference.export:export")
