"""Make a folder of a trained model for others: safetensors, config.json, and a card whose figures can be checked.

python src/share.py runs/NAME/checkpoints/best.ckpt nuclei --license mit --data-license cc0-1.0
python src/share.py runs/NAME/checkpoints/best.ckpt nuclei --push user/nuclei    to the Hugging Face hub, too
python src/eval.py nuclei                                                        the card's figures again
python src/predict.py hf://user/nuclei photos masks

Any option of eval.py: --split val --data OVERLAY --trainer.precision 32-true, in which the folder then predicts
"""

from segmentation.training.entry import run_job

if __name__ == "__main__":
    run_job("segmentation.inference.share:share")
