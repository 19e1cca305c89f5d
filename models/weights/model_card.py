"""The model card (README.md) that travels with an exported net."""

import json

from models.blip import BLIP

USES = {'caption': "DLIPProd.from_pretrained('{folder}').generate('dog.jpg')   # ['a dog ...']",
        'retrieval': "DLIPProd.from_pretrained('{folder}').similarity('dog.jpg', ['a dog', 'a cat'])  # [1, 2]"}
THEIRS = {'caption': "BlipForConditionalGeneration.from_pretrained('{folder}')",
          'retrieval': "BlipForImageTextRetrieval.from_pretrained('{folder}')  # its input_ids[:, 0] must be [ENC]"}


def model_card(model: BLIP, info: dict, folder: str = 'THIS_FOLDER') -> str:
    """What a net is, how it was made and measured, and how to use it, as the hub's Markdown with its header."""
    config, run = model.config, info.get('config') or {}
    tasks = [task for task in USES if config.task in (task, 'pretrain')]
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    lines = ['---', 'library_name: transformers', 'tags:', '- dlip', '- blip', '- distillation',
             f'pipeline_tag: {"image-to-text" if "caption" in tasks else "feature-extraction"}', '---', '',
             f'# A {config.task} net of DLIP', '',
             f'{parameters:.1f}M parameters: ViT of {config.vision_depth} layers, {config.vision_width} wide, on '
             f'{config.image_size} px images; BERT of {config.text_depth} layers, {config.text_width} wide. '
             f'Architecture and key names are those of BLIP ([arXiv 2201.12086](https://arxiv.org/abs/2201.12086)), '
             f'distillation follows DLIP ([arXiv 2308.12956](https://arxiv.org/abs/2308.12956)).', '',
             '## Use', '', '```python', 'from prod import DLIPProd  # in the DLIP repository']
    lines += [USES[task].format(folder=folder) for task in tasks]
    lines += ['```', '', 'or, without the repository:', '', '```python', 'import transformers']
    lines += [f'transformers.{THEIRS[task].format(folder=folder)}' for task in tasks]
    lines += ['```', '']
    if len(tasks) == 2:
        lines += ['The two parts share weights; each class of transformers loads its own and calls the other keys '
                  'unexpected.', '']
    lines += ['## Measured', '', *metrics_table(info.get('metrics'))]
    lines += ['', '## Data and training', '', *training(run)]
    return '\n'.join(lines) + '\n'


def metrics_table(metrics: dict | None) -> list[str]:
    if not metrics:
        return ['No metrics travelled with the checkpoint.']
    rows = [f'| {name} | {f"{value:.2f}" if isinstance(value, float) else value} |' for name, value in metrics.items()]
    return ['On the validation data of the run that made it:', '', '| metric | value |', '|---|---:|', *rows]


def training(run: dict) -> list[str]:
    if not run:
        return ['The checkpoint does not say what it was trained on.']
    data = run.get('data', {})
    source = data.get('train') or data.get('root') or 'not said'
    return [f'Trained on `{source}`, starting from `{run.get("model", {}).get("init")}`, taught by '
            f'`{run.get("teacher", {}).get("weights")}`. The whole configuration:', '', '```json',
            json.dumps(run, indent=1), '```']
