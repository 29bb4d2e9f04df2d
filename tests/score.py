"""How far the score of a box can be trusted, on shapes: python tests/score.py runs/shapes/best.pt

Draws new scenes. Of each expression the model is asked twice: in its own scene, and
in one where nothing fits, since no shape there has the attributes that it says of what is meant.
Prints the areas under the ROC curve of the score: fitting against unfitting questions, and right
against wrong boxes among the fitting ones; and the correlation of score and IoU.
"""

import io
import random
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import evaluate
from hivg import box_iou, load_checkpoint

SCENES = 600


def draw_scene(number):
    """(image, shapes, [(text, description of what is meant, its box)])."""
    rng = random.Random(f"score {number}")
    shapes = data.random_shapes(rng, rng.choice((3, 4, 5)))
    expressions = []
    for sort in data.SORTS["val"]:
        for _ in range(100):
            DESCRIPTIONS.clear()
            expression = data.try_expression(rng, shapes, sort)
            if expression:
                text, shape = expression
                expressions.append((text, DESCRIPTIONS[0], shape.box))
                break
    file = io.BytesIO()
    data.render(rng, shapes).save(file, "jpeg", quality=90)
    return Image.open(file), shapes, expressions


DESCRIPTIONS = []  # that data.try_expression draws, what is meant first


def random_description(rng, shape, draw=data.random_description):
    DESCRIPTIONS.append(draw(rng, shape))
    return DESCRIPTIONS[-1]


data.random_description = random_description


def roc_area(positive, negative):
    """The probability that a positive score is above a negative one; ties count half."""
    differences = positive[:, None] - negative[None, :]
    return ((differences > 0).double().mean() + (differences == 0).double().mean() / 2).item()


def main():
    model = load_checkpoint(sys.argv[1])
    scenes = [draw_scene(number) for number in range(SCENES)]
    rng = random.Random(0)
    fitting, unfitting, iou = [], [], []
    for image, _, expressions in scenes:
        for text, description, box in expressions:
            images = [
                image for image, shapes, _ in scenes if not data.matching(shapes, description)
            ]
            if not images:
                continue  # it says nothing of what is meant: "left most thing"
            (here,) = evaluate.ground_texts(model, image, text)
            (elsewhere,) = evaluate.ground_texts(model, rng.choice(images), text)
            fitting.append(here.score)
            unfitting.append(elsewhere.score)
            true = torch.tensor([box]) / 2  # half pixels -> pixels
            iou.append(box_iou(torch.tensor([here.box]), true).item())
    fitting, unfitting, iou = map(torch.tensor, (fitting, unfitting, iou))
    right = iou >= 0.5
    print(f"{len(iou):,} expressions, Acc@0.5 {right.float().mean():.1%}")
    print(f"ROC area, fitting against unfitting: {roc_area(fitting, unfitting):.3f}")
    print(f"ROC area, right against wrong boxes: {roc_area(fitting[right], fitting[~right]):.3f}")
    print(f"correlation of score and IoU: {torch.corrcoef(torch.stack([fitting, iou]))[0, 1]:.2f}")


if __name__ == "__main__":
    main()
