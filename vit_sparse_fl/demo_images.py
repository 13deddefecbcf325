"""Procedural images, 100 learnable classes of 32 x 32 pixels: the dataset `demo`, which needs no download.

Class c shows shape c % 10 in colour c // 10, at a random place and size, on a random dim gradient, with a small
square of any colour behind it and noise over all. Every shape is its own mirror image, so that flips keep the
class. Only sums, products, roots and comparisons are used: the pixels are the same on every machine.
"""

import functools

import numpy as np

from common.seeding import stream

CLASSES, TRAIN, TEST, SIZE = 100, 80, 20, 32  # classes, images a class, pixels a side
SHAPES = 10
COLOURS = [bytes.fromhex(c) for c in "e12d2d f08c1e ebe13c 3cbe3c 32cdcd 325ae6 8c3cc8 f06ebe f0f0f0 82552d".split()]


@functools.cache
def demo_images():
    """(train, train_labels, test, test_labels), the same for every seed, classes in random order, read-only:
    uint8 [8000, 3, 32, 32], int64 [8000], uint8 [2000, 3, 32, 32], int64 [2000]."""
    generator = stream(0, "demo images")
    count = CLASSES // SHAPES * (TRAIN + TEST)
    colour = np.repeat(np.arange(CLASSES // SHAPES), TRAIN + TEST)  # of the images of one shape: [count]
    images = np.empty((SHAPES, count, 3, SIZE, SIZE), dtype=np.uint8)
    for shape in range(SHAPES):
        images[shape] = _images(shape, colour, generator)
    labels = colour * SHAPES + np.arange(SHAPES)[:, None]  # [shapes, count]
    images = images.reshape(CLASSES, TRAIN + TEST, 3, SIZE, SIZE)
    labels = labels.reshape(CLASSES, TRAIN + TEST)
    splits = []
    for part in (slice(TRAIN), slice(TRAIN, None)):
        order = generator.permutation(labels[:, part].size)
        splits += [images[:, part].reshape(-1, 3, SIZE, SIZE)[order], labels[:, part].reshape(-1)[order]]
    for array in splits:
        array.flags.writeable = False
    return tuple(splits)


def _images(shape, colour, generator):
    """Images of one shape: uint8 [n, 3, 32, 32]."""
    n = len(colour)

    def uniform(low, high, *size):
        return low + (high - low) * generator.random((n, *size, 1, 1), dtype=np.float32)

    pixel = np.arange(SIZE, dtype=np.float32)
    y, x = pixel[:, None], pixel[None, :]
    ground = uniform(30, 90, 3) + uniform(-1.5, 1.5, 1) * (x - 16) + uniform(-1.5, 1.5, 1) * (y - 16)
    at_x, at_y = uniform(2, 30), uniform(2, 30)
    square = (abs(x - at_x) < 3) & (abs(y - at_y) < 3)  # [n, 32, 32]
    image = np.where(square[:, None], uniform(0, 255, 3), ground)  # [n, 3, 32, 32]

    half = uniform(7, 11)
    u, v = (x - uniform(11, 21)) / half, (y - uniform(11, 21)) / half  # [n, 32, 32], within -1..1 on the shape
    cover = np.clip(inside(shape, u, v) * half + np.float32(0.5), 0, 1)[:, None]  # [n, 1, 32, 32]
    ink = np.array([[*rgb] for rgb in COLOURS], dtype=np.float32)[colour][:, :, None, None] + uniform(-20, 20, 3)
    image += cover * (ink - image)
    image += generator.integers(-25, 26, image.shape, dtype=np.int8)
    return np.clip(image, 0, 255).astype(np.uint8)


def inside(shape, u, v):
    """About the distance to the shape's edge, in half sizes, positive inside; u to the right, v down."""
    wide, high = abs(u), abs(v)
    box = np.float32(0.9) - np.maximum(wide, high)
    if shape == 0:  # disc
        return 1 - np.sqrt(u * u + v * v)
    if shape == 1:  # square
        return box
    if shape == 2:  # ring
        return np.float32(0.25) - abs(np.sqrt(u * u + v * v) - np.float32(0.8))
    if shape in (3, 4):  # plus, x
        if shape == 4:
            turn = np.float32(0.7071)
            wide, high = abs(u + v) * turn, abs(u - v) * turn
        return np.float32(0.25) - np.maximum(np.minimum(wide, high), np.maximum(wide, high) - np.float32(0.75))
    if shape == 5:  # triangle
        return np.minimum(np.float32(0.8) - v, (v + 1 - 2 * wide) * np.float32(0.447))
    if shape == 6:  # hourglass
        return np.minimum(box, (high - wide) * np.float32(0.7071) + np.float32(0.15))
    # Three bars that lie, three that stand, and where both or neither are: a chessboard
    lying, standing = (np.float32(0.2) - abs((w * 1.25 + 64.5) % 1 - np.float32(0.5)) * np.float32(0.8) for w in (v, u))
    if shape == 7:
        return np.minimum(box, lying)
    if shape == 8:
        return np.minimum(box, standing)
    return np.minimum(box, np.where(lying * standing > 0, 1, -1) * np.minimum(abs(lying), abs(standing)))
