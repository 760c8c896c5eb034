"""share.py: a trained model as a folder for others, in the files of the Hugging Face hub, with a card to check."""

import json
import shlex
from argparse import Namespace
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from safetensors.torch import save

from segmentation.checkpoint import HUB, read_checkpoint
from segmentation.data.writing import atomic_write_all
from segmentation.errors import InputError, one_line
from segmentation.inference.bootstrap import bootstrap, intervals, iou
from segmentation.inference.compare import read_counts
from segmentation.inference.evaluate import evaluate
from segmentation.inference.prune import KEPT
from segmentation.nets.weights import SHARED
from segmentation.training.entry import JobParser, refuse_existing, start_job

CARD = """\
---
{{ card_data }}
---

# {{ title }}
{% if about %}
{{ about }}
{% endif %}
```bash
python src/predict.py {{ source }} photo.png masks --overlay
python src/train.py --name mine --model.init_from {{ source }}   # an error says which options the net needs
```

IoU on the {{ split }} split, {{ images | length }} images, with the 95 % interval of a bootstrap over them:

| class | IoU |
|---|---|
{%- for name, estimate in ious.items() %}
| {{ name }} | {{ "{}".format(estimate) }} |
{%- endfor %}

The worst images: {{ images[:4] | join(", ") }}. The best: {{ images[-4:] | join(", ") }}.

## Check it

`{{ command }}`

says whether its figures are these, to the last digit (config.json has them all), and if not, what of this differs:

- data: `{{ data }}`, of the split's names, sizes and pixels
- code: commit {{ commit }}
- {{ precision }} on {{ hardware }}

## Training
{% if training %}
{{ "%.1f" | format(training.minutes) }} minutes on {{ training.hardware }}, code of commit {{ training.commit }}.
{%- else %}
Unknown: its run has not left a summary.json.
{%- endif %}
The options are in config.json. Licence of the weights: {{ license }}. Licence of the data: {{ data_license }}.

"""


def share(args: list[str] | None = None) -> None:
    """Evaluate a checkpoint and write the folder; with `--push` upload it.

    Raises:
        InputError: the folder has such files, there is no token to upload with, or the hub refuses it.
    """
    start_job()
    options, rest = parse(args)
    if options.push and not get_token():
        raise InputError(f"--push {options.push}: there is no token of the Hugging Face hub here. Type: hf auth login")
    files = [Path(options.folder) / name for name in SHARED]
    refuse_existing(files, options.overwrite)
    checkpoint = read_checkpoint(options.checkpoint)
    with TemporaryDirectory() as aside:
        output = Path(aside) / "eval.json"
        with redirect_stdout(StringIO()):  # it names files that are gone afterwards
            evaluate([options.checkpoint, *rest, "--output", str(output)])
        evaluation = json.loads(output.read_bytes())
        card = model_card(options, rest, evaluation, output.with_name("eval_per_image.csv"))
    config = {key: checkpoint[key] for key in (*KEPT, "hyper_parameters") if key in checkpoint}
    config["precision"] = evaluation["precision"]
    config["evaluation"] = evaluation
    config["calibration"] = checkpoint.get("calibration")
    tensors = {name: weight.clone().contiguous() for name, weight in checkpoint["state_dict"].items()}
    with atomic_write_all(*files) as (weights, about, readme):
        weights.write_bytes(save(tensors, metadata={"format": "pt"}))
        about.write_text(json.dumps(config, indent=2), encoding="utf-8")
        card.save(readme)
    print(f"shared     {options.folder}: read README.md and config.json, in which are paths of yours")
    if options.push:
        push(options.folder, options.push)


def model_card(options: Namespace, rest: list[str], evaluation: dict, per_image: Path) -> ModelCard:
    """The README.md of a model, with metadata that the hub reads.

    Args:
        options: those of the command line.
        rest: those that went to eval.
        evaluation: what eval.py wrote.
        per_image: the counts that it wrote.
    """
    images, classes, counts = read_counts(per_image)
    source = f"{HUB}{options.push}" if options.push else options.folder
    summary = Path(options.checkpoint).parent.parent / "summary.json"
    each = iou(counts)[:, -1]
    order = each.argsort()[: np.isfinite(each).sum()]  # NaN comes last
    return ModelCard.from_template(
        ModelCardData(license=options.license, pipeline_tag="image-segmentation", tags=["semantic-segmentation"]),
        template_str=CARD,
        **evaluation,
        **vars(options),
        title=Path(options.folder).name,
        source=source,
        command=f"python src/eval.py {shlex.join([source, *rest])}",
        images=[f"{images[index]} ({each[index]:.3f})" for index in order],
        ious=intervals([*classes, "mIoU"], iou(counts.sum(axis=0)), bootstrap([counts])[0]),
        training=json.loads(summary.read_bytes()) if summary.is_file() else {},
    )


def push(folder: str, repository: str) -> None:
    """Upload the folder to the hub."""
    api = HfApi()
    try:
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(SHARED))
    except Exception as error:  # each library on the way has its own errors
        raise InputError(f"--push {repository}: {one_line(error)}. Then: hf upload {repository} {folder}") from error
    print(f"pushed     {url}")


def parse(args: list[str] | None) -> tuple[Namespace, list[str]]:
    parser = JobParser("share")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .ckpt file of train.py")
    parser.add_argument("folder", metavar="FOLDER", help="to be written")
    parser.add_argument("--about", metavar="TEXT", help="for the card: what it is for, and where the data is from")
    parser.add_argument("--license", default="unknown", help="of the weights, as the hub names it: mit, cc-by-4.0")
    parser.add_argument("--data-license", default="unknown", help="of the images that they were trained on")
    parser.add_argument("--push", metavar="USER/NAME", help="upload the folder to the Hugging Face hub")
    parser.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    return parser.parse_known_args(args)
