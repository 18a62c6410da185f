"""Pictures and labels: what is read, how it is augmented, in which order, and what is refused."""

import multiprocessing
import statistics
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from rectangles import COLOURS, VOID
from segmentation.data import IGNORE, Pictures, open_source
from segmentation.distributed import Processes
from segmentation.errors import DataError
from segmentation.order import Order
from segmentation.transforms import MEAN, STD, evaluation_transform, training_transform

CPU = torch.device("cpu")


def pictures(options, split="train"):
    transform = training_transform(options) if split == "train" else evaluation_transform()
    return Pictures(open_source(options, split), transform, options.seed)


def read_all(options):
    """Every training picture, as a loader's worker in another process reads them."""
    return list(torch.utils.data.DataLoader(pictures(options), sampler=[(0, i) for i in range(7)], num_workers=1))


def natural(image):
    return image * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def test_validation_pictures_are_whole_and_void_is_ignored(tiny, data):
    image, labels = pictures(tiny(), "val")[0, 1]
    file = np.asarray(Image.open(data / "val/labels/1.png"))
    assert image.shape == (3, 44, 56)
    assert ((labels == IGNORE).numpy() == (file == VOID)).all()
    assert (labels.numpy()[file != VOID] == file[file != VOID]).all()


def test_augmented_labels_stay_on_their_pixels(tiny):
    """Scaled, cropped and mirrored, a pixel's colour still tells its class, and padding is void."""
    options = tiny(jitter=0.0, scale=(0.4, 2.0), crop=64)
    source = pictures(options)
    agreeing, drawn, padded = [], set(), set()
    for epoch in range(6):
        for index in range(len(source)):
            image, labels = source[epoch, index]
            assert image.shape == (3, 64, 64)
            assert labels.shape == (64, 64)
            distance = (natural(image)[None] * 255 - torch.tensor(COLOURS).float()[:, :, None, None]).square().sum(1)
            known = labels != IGNORE
            agreeing.append(float((distance[:3].argmin(0) == labels)[known].float().mean()))
            padded.add(bool((labels == IGNORE).float().mean() > 0.5))
            drawn.add(image.numpy().tobytes())
    assert statistics.median(agreeing) > 0.93  # borders mix colours
    assert min(agreeing) > 0.7
    assert padded == {True, False}
    assert len(drawn) == 42  # no two alike


def test_augmentation_depends_on_epoch_and_index_alone(tiny):
    options = tiny()
    state = torch.get_rng_state()
    here = [pictures(options)[0, i] for i in reversed(range(7))][::-1]
    assert torch.equal(torch.get_rng_state(), state)  # dropout draws as if no picture had been loaded
    for (image, labels), (other_image, other_labels) in zip(here, read_all(options), strict=True):
        assert torch.equal(image, other_image[0])
        assert torch.equal(labels, other_labels[0])
    assert not torch.equal(pictures(options)[1, 0][0], here[0][0])
    assert not torch.equal(pictures(tiny(seed=1))[0, 0][0], here[0][0])


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_processes_share_the_batches_of_one(tiny, start):
    """Batches over two processes, from any step on, are those of one process that began at step 0."""
    options = tiny(batch_size=2)
    source = pictures(options)

    def batches(rank, count, first, number):
        order = Order(source, options, Processes(CPU, rank, count)).batches(first)
        return [next(order)[0] for _ in range(number)]

    alone = batches(0, 1, 0, 8)[start:]
    shares = [batches(rank, 2, start, 8 - start) for rank in (0, 1)]
    for whole, first, second in zip(alone, *shares, strict=True):
        torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=0)
    assert not torch.equal(batches(0, 1, 0, 4)[3], batches(0, 1, 0, 1)[0])  # the second epoch is another


def test_order_leaves_the_random_state_of_dropout_alone(tiny):
    options = tiny()
    order = Order(pictures(options), options, Processes(CPU)).batches(0)
    state = torch.get_rng_state()
    for _ in range(7):
        next(order)
    assert torch.equal(torch.get_rng_state(), state)


def test_impossible_batches_are_refused(tiny):
    source = pictures(tiny())
    with pytest.raises(DataError, match="--batch-size: 8 is more than the 7 training pictures"):
        Order(source, tiny(batch_size=8), Processes(CPU))
    with pytest.raises(DataError, match="--batch-size: 3 does not divide among 2 processes"):
        Order(source, tiny(batch_size=3), Processes(CPU, 0, 2))


def test_missing_folders_and_labels_are_named(tiny, data):
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        open_source(tiny(data=data / "nowhere"), "train")
    with pytest.raises(DataError, match=r"test/images: no such folder"):
        open_source(tiny(), "test")
    (data / "train/labels/4.png").unlink()
    with pytest.raises(DataError, match=r"labels/4.png: no such file; 1 of 7 pictures lack labels"):
        open_source(tiny(), "train")
    for image in (data / "val/images").iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r"val/images: no pictures"):
        open_source(tiny(), "val")


@pytest.mark.parametrize("dataset", ["voc", "cityscapes", "pets"])
def test_a_folder_of_another_data_set_is_refused(tiny, data, dataset):
    with pytest.raises(DataError, match=f"{data}: no {dataset} data set here"):
        open_source(tiny(dataset=dataset), "train")


def test_a_label_out_of_range_is_named(tiny, data):
    labels = np.zeros((44, 56), dtype=np.uint8)
    labels[5, 7] = 9
    Image.fromarray(labels).save(data / "train/labels/2.png")
    with pytest.raises(DataError, match=r"images/2.png: label 9 is no class of this data set; known are 3, 0, 1, 2"):
        pictures(tiny())[0, 2]


def test_labels_of_another_size_or_kind_are_named(tiny, data):
    Image.fromarray(np.zeros((44, 57), dtype=np.uint8)).save(data / "train/labels/3.png")
    with pytest.raises(DataError, match=r"images/3.png: the picture is 56×44, its labels are 57×44"):
        pictures(tiny())[0, 3]
    Image.fromarray(np.zeros((44, 56, 3), dtype=np.uint8)).save(data / "train/labels/3.png")
    with pytest.raises(DataError, match=r"images/3.png: expected labels of one 8-bit channel, got mode RGB"):
        pictures(tiny())[0, 3]


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_voc(root, picture, labels):
    save(root / "VOCdevkit/VOC2012/JPEGImages/a.jpg", picture)
    save(root / "VOCdevkit/VOC2012/SegmentationClass/a.png", labels)
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation").mkdir(parents=True)
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").write_text("a\n")


def make_cityscapes(root, picture, labels):
    save(root / "leftImg8bit/train/ulm/ulm_0_0_leftImg8bit.png", picture)
    save(root / "gtFine/train/ulm/ulm_0_0_gtFine_labelIds.png", labels)


def make_pets(root, picture, labels):
    save(root / "oxford-iiit-pet/images/Cat_1.jpg", picture)
    save(root / "oxford-iiit-pet/annotations/trimaps/Cat_1.png", labels)
    (root / "oxford-iiit-pet/annotations/trainval.txt").write_text("Cat_1 1 1 1\n")


@pytest.mark.parametrize(
    ("dataset", "make", "classes", "labels", "expected"),
    [
        ("voc", make_voc, 21, [0, 20, 255], [0, 20, IGNORE]),
        ("cityscapes", make_cityscapes, 19, [0, 7, 33, 29], [IGNORE, 0, 18, IGNORE]),
        ("pets", make_pets, 2, [1, 2, 3], [1, 0, IGNORE]),
    ],
)
def test_torchvision_data_sets_are_read(tiny, tmp_path, dataset, make, classes, labels, expected):
    values = np.array([labels, labels], dtype=np.uint8)
    make(tmp_path / dataset, np.zeros((*values.shape, 3), dtype=np.uint8), values)
    source = open_source(tiny(dataset=dataset, data=tmp_path / dataset), "train")
    image, found = Pictures(source, evaluation_transform())[0, 0]
    assert len(source.classes) == classes
    assert image.shape == (3, 2, len(labels))
    assert found.tolist() == [expected, expected]


def test_a_loader_s_worker_ends_when_the_run_says_so_and_not_before(tiny):
    """A scheduler's SIGTERM goes to all processes; the training process needs its workers until it has saved."""
    options = tiny(workers=1, batch_size=1)
    batches = Order(pictures(options), options, Processes(CPU)).batches(0)
    others = multiprocessing.active_children()
    next(batches)
    (worker,) = [process for process in multiprocessing.active_children() if process not in others]
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    for _ in range(9):
        next(batches)
    assert worker.is_alive()
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0
