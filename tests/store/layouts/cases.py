"""Layouts as people have them, a case each: the images that come out with their classes, or the words that are said."""

from __future__ import annotations

from tests.store.layouts.trees import (
    WNIDS,
    Case,
    each,
    json_lines,
    lines,
    meta_mat,
    png_of,
    shard,
    table,
)
from tests.store.written_sources import NAMES, tar_of

TRAIN, VAL = each("train/{c}/{i}.png"), each("val/{c}/{i}.png", first=5)
ROOT = each("{c}/{i}.png")
X = b"not an image"
WORDS = b"".join(f"{wnid}\tword of {wnid}\n".encode() for wnid in (*WNIDS, "n00001740"))

TINY = each("train/{c}/images/{c}_{i}.JPEG", WNIDS)
TINY_VAL = each("val/images/val_{n}.JPEG", WNIDS)
TINY_LIST = {"val/val_annotations.txt": lines(TINY_VAL, "{name}\t{c}\t0\t0\t9\t9")}
TINY_TEXTS = {f"train/{wnid}/{wnid}_boxes.txt": X for wnid in WNIDS} | {
    "wnids.txt": X,
    "words.txt": WORDS,
}
FLAT = each("val/ILSVRC2012_val_{n:08d}.JPEG", WNIDS)
WNID_TRAIN = each("train/{c}/{c}_{i}.JPEG", WNIDS)
KAGGLE = "ILSVRC/Data/CLS-LOC"
KAGGLE_TRAIN = each(KAGGLE + "/train/{c}/{c}_{i}.JPEG", WNIDS)
KAGGLE_VAL = each(KAGGLE + "/val/ILSVRC2012_val_{n:08d}.JPEG", WNIDS)
KAGGLE_FILES = {
    "LOC_val_solution.csv": lines(KAGGLE_VAL, "{stem},{c} 85 1 499 272 ", "ImageId,PredictionString"),
    "LOC_train_solution.csv": b"ImageId,PredictionString\nx,n01443537 1 2 3 4\n",
    "LOC_synset_mapping.txt": WORDS.replace(b"\t", b" "),
    "ILSVRC/ImageSets/CLS-LOC/val.txt": lines(KAGGLE_VAL, "{stem} 7"),
    f"{KAGGLE}/test/ILSVRC2012_test_00000001.JPEG": png_of("test"),
    "ILSVRC/Annotations/CLS-LOC/train/n01443537/n01443537_0.xml": X,
    "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml": X,
}  # fmt: skip
DEVKIT = "ILSVRC2012_devkit_t12/data/"
# Line k is the id of image k; ids count the classes backwards.
GROUND_TRUTH = {DEVKIT + "ILSVRC2012_validation_ground_truth.txt": b"3\n3\n2\n2\n1\n1\n"}
BACKWARDS = {DEVKIT + "ILSVRC2012_validation_ground_truth.txt": b"1\n1\n2\n2\n3\n3\n"}
META = {DEVKIT + "meta.mat": meta_mat(WNIDS)}
JUNK = (
    "train/ant/._0.png", "train/@eaDir/x.jpg", "train/ant/@eaDir/0.png/thumb.jpg", "__MACOSX/train/ant/._0.png",
    "train/.ipynb_checkpoints/0-checkpoint.png", "train/ant/Thumbs.db", ".DS_Store", "val/.DS_Store", "desktop.ini",
)  # fmt: skip
HF = each("train/{c}{i}.png"), each("validation/{c}{i}.png", first=5)
HF_TABLES = {
    "train/metadata.csv": lines(HF[0], "{name},{c}", "file_name,label"),
    "validation/metadata.csv": lines(HF[1], "{name},{c}", "file_name,label"),
}
SIZES = {size: each(size + "/train/{c}/{i}.png") for size in ("full_size", "160px")}
SIZES_VAL = each("full_size/val/{c}/{i}.png")
CATS = each("train/{c}.{i}.jpg")
TWO_LEVELS = {"wild/ant/0.png": "ant", "wild/bee/0.png": "bee", "tame/cat/0.png": "cat"}
UPPER = {"wild/ant/0.png": "wild", "wild/bee/0.png": "wild", "tame/cat/0.png": "tame"}
FOOD = each("images/{c}/{i}.jpg")
FOOD_FILES = {"meta/train.txt": X, "meta/test.txt": X, "meta/classes.txt": X}
DOTS = each("img_{n:03d}.05.png")
NAMED = {"classes.txt": b"ant\nbee\ncat\n"}
BY_CLASS = {name: each(name + "_{i}.JPEG", (name,)) for name in NAMES}
ALL_OF_CLASS = {path: name for truth in BY_CLASS.values() for path, name in truth.items()}
CLASS_TARS = {name: shard(truth, label="") for name, truth in BY_CLASS.items()}
WNID_TRUTH = {name: each(name + "_{i}.JPEG", (name,)) for name in WNIDS}
ALL_OF_WNID = {path: name for truth in WNID_TRUTH.values() for path, name in truth.items()}
WNID_TARS = {name: shard(truth, label="") for name, truth in WNID_TRUTH.items()}
FLAT_VAL = each("ILSVRC2012_val_{n:08d}.JPEG", tuple(reversed(WNIDS)))
IN_TARS = each("{c}/{i}.png"), each("{c}/v{i}.png")
HALVES = each("a/{i}{c}.png"), each("b/{i}{c}.png")
DOGS = each("images/{c}_{i}.jpg", ("american_bulldog", "american_pit_bull", "beagle"))
SPLIT_LIKE = ("cup", "train", "test_tube", "val_d")
TRAINS = ("bus", "car", "freight_train", "test_car")
TRAIN_TARS = {name: shard(each(name + "_{i}.png", (name,)), label="") for name in TRAINS}
TRAIN_TARS_VAL = {
    name: shard(each(name + "_{i}.png", (name,), first=5), label="") for name in TRAINS
}
ALL_OF_TRAINS, ALL_OF_TRAINS_VAL = each("{c}_{i}.png", TRAINS), each("{c}_{i}.png", TRAINS, first=5)
PANDA_NAMES = ("cat", "red", "red panda")
PANDAS_TRAIN, PANDAS = each("train/{c}/{i}.png", PANDA_NAMES), each("val/{n}.png", PANDA_NAMES)
LOOSE_VAL = each("val/{n}.png")


def layout(text: str) -> dict[str, str]:
    return {"layout": text}


READ = [
    # Splits, and where they lie.
    Case("classes-at-the-root", ROOT, "expected held-out images"),
    Case("train-val", TRAIN, VAL),
    Case("train-test", TRAIN, each("test/{c}/{i}.png")),
    Case("Training-Testing", each("Training/{c}/{i}.png"), each("Testing/{c}/{i}.png")),
    Case("train-dev", TRAIN, each("dev/{c}/{i}.png")),
    Case("train-valid", TRAIN, each("valid/{c}/{i}.png")),
    Case("TRAIN-Validation", each("TRAIN/{c}/{i}.png"), each("Validation/{c}/{i}.png")),
    Case("val-before-test", TRAIN, VAL, images=each("test/{c}/{i}.png", first=9)),
    Case("test-without-labels", TRAIN, "without labels", images=each("test/{n}.png")),
    Case("seg_train-twice", each("seg_train/seg_train/{c}/{i}.jpg"), each("seg_test/seg_test/{c}/{i}.jpg"),
         images=each("seg_pred/seg_pred/{n}.jpg")),
    Case("training_set-twice", each("training_set/training_set/{c}/{i}.jpg"), each("test_set/test_set/{c}/{i}.jpg")),
    Case("parent", each("animals/train/{c}/{i}.png"), each("animals/val/{c}/{i}.png")),
    Case("parent-of-parent", each("archive/animals/train/{c}/{i}.png"), each("archive/animals/test/{c}/{i}.png")),
    Case("parent-of-classes", each("animals/{c}/{i}.png"), "expected held-out images"),
    Case("parent-called-test", each("my_test_data/train/{c}/{i}.png"), each("my_test_data/val/{c}/{i}.png")),
    Case("one-folder-below-train", each("train/data/{c}/{i}.png"), VAL),
    Case("only-train", TRAIN, "expected held-out images"),
    Case("val-elsewhere", TRAIN, each("other/{c}/{i}.png"), at="train", val_at="other"),
    Case("val-of-one-class", TRAIN, {"val/bee/9.png": "bee"}),
    Case("val-of-one-class-elsewhere", ROOT, {"other/bee/9.png": "bee"}, val_at="other", options=layout("{class}/*")),
    # ImageNet and its kin.
    Case("tiny-imagenet", TINY, TINY_VAL, {**TINY_LIST, **TINY_TEXTS}),
    Case("tiny-imagenet-with-test", TINY, TINY_VAL, TINY_LIST, images=each("test/images/test_{n}.JPEG")),
    Case("tiny-imagenet-in-a-parent", each("t/train/{c}/images/{i}.JPEG", WNIDS), each("t/val/images/v{n}.JPEG", WNIDS),
         {"t/val/val_annotations.txt": lines(each("t/val/images/v{n}.JPEG", WNIDS), "{name}\t{c}\t0")}),
    Case("tiny-imagenet-folder-by-folder", TINY, TINY_VAL, TINY_LIST, at="train", val_at="val"),
    Case("kaggle-ilsvrc", KAGGLE_TRAIN, KAGGLE_VAL, KAGGLE_FILES),
    Case("val-list-of-names", WNID_TRAIN, FLAT, {"val.txt": lines(FLAT, "{name} {c}")}),
    Case("val-list-beside-predictions", WNID_TRAIN, FLAT,
         {"val.txt": lines(FLAT, "{name} {c}"), "val_predictions.txt": lines(FLAT, "{name} " + WNIDS[0])}),
    Case("val-lists-that-agree", WNID_TRAIN, FLAT,
         {"val.txt": lines(FLAT, "{name} {c}"), "val/val_annotations.txt": lines(FLAT, "{name}\t{c}\t0")}),
    Case("val-list-of-paths", WNID_TRAIN, FLAT, {"val_labels.csv": lines(FLAT, "{path},{c}", "path,label")}),
    Case("val-list-of-numbers", WNID_TRAIN, FLAT,
         {"val.txt": lines(FLAT, "{name} {k}", classes=WNIDS), "synsets.txt": "\n".join(WNIDS).encode()}),
    Case("devkit", WNID_TRAIN, FLAT, {**GROUND_TRUTH, **META}),
    Case("val-list-with-spaces", each("train/{c}/{i}.png", ("big cat", "bee")), each("val/{n}.png", ("big cat", "bee")),
         {"val/labels.txt": lines(each("val/{n}.png", ("big cat", "bee")), "{name} {c}", classes=("big cat", "bee"))}),
    Case("val-list-of-names-that-begin-alike", PANDAS_TRAIN, PANDAS,
         {"val.txt": lines(PANDAS, "{name},{c}"),
          "val/boxes.csv": lines(PANDAS, "{stem},{c} 1 2 3 4 {c} 85 1.5 -9 272 ", "ImageId,PredictionString")}),
    Case("val-list-composed-otherwise", each("train/{c}/{i}.png", ("caf\u00e9", "tea")), each("val/{n}.png", ("caf\u00e9", "tea")),
         {"val/labels.txt": lines(each("val/{n}.png", ("cafe\u0301", "tea")), "{name}\t{c}")}),
    Case("val-list-of-numbers-from-1", TRAIN, LOOSE_VAL, options={"numbers": "index-from-1"},
         files=NAMED | {"val.txt": "".join(f"{i}.png {(i + 1) // 2}\n" for i in range(1, 7)).encode()}),
    Case("val-list-of-places", TRAIN, LOOSE_VAL, {"val.txt": lines(LOOSE_VAL, "{name} {k}")}, options={"numbers": "index"}),
    Case("tars-of-classes", ALL_OF_CLASS, files={f"train/{n}.tar": c for n, c in CLASS_TARS.items()}, packed=True),
    Case("tars-of-classes-of-which-two-are-called-as-splits", ALL_OF_TRAINS, "expected held-out images",
         {f"{n}.tar": c for n, c in TRAIN_TARS.items()}, packed=True),
    Case("tars-of-classes-of-which-one-is-called-test", {p: c for p, c in ALL_OF_TRAINS.items() if c != "freight_train"},
         files={f"{n}.tar": c for n, c in TRAIN_TARS.items() if n != "freight_train"}, packed=True),
    Case("tars-of-classes-in-folders-of-splits", ALL_OF_TRAINS, ALL_OF_TRAINS_VAL, packed=True,
         files={f"{s}/{n}.tar": c for s, t in (("train", TRAIN_TARS), ("val", TRAIN_TARS_VAL)) for n, c in t.items()}),
    Case("tars-of-classes-in-a-tar", ALL_OF_CLASS, packed=True,
         files={"ILSVRC2012_img_train.tar": tar_of([(f"{n}.tar", c) for n, c in CLASS_TARS.items()])}),
    Case("ilsvrc-as-downloaded", ALL_OF_WNID, FLAT_VAL, packed=True,
         files={"ILSVRC2012_img_train.tar": tar_of([(f"{n}.tar", c) for n, c in WNID_TARS.items()]),
                "ILSVRC2012_img_val.tar": shard(FLAT_VAL, label=""), "ILSVRC2012_devkit_t12.tar.gz": X, **BACKWARDS, **META}),
    Case("ilsvrc-val-tar-with-its-list", ALL_OF_WNID, FLAT_VAL, packed=True, val_at="val",
         files={"train.tar": tar_of([(f"{n}.tar", c) for n, c in WNID_TARS.items()]),
                "val/ILSVRC2012_img_val.tar": shard(FLAT_VAL, label=""), "val/val.txt": lines(FLAT_VAL, "{name} {c}")}),
    Case("tars-of-folders", *IN_TARS, {"train.tar": shard(IN_TARS[0], label=""), "val.tar": shard(IN_TARS[1], label="")},
         packed=True),
    Case("several-tars-of-folders", IN_TARS[0] | IN_TARS[1], "expected held-out images", packed=True,
         files={f"part-{k}.tar": shard(truth, label="") for k, truth in enumerate(IN_TARS)}),
    Case("tar-of-a-data-set", TRAIN, VAL, packed=True,
         files={"set.tar": tar_of([("README", X), ("._x.png", X), *((p, png_of(p)) for p in TRAIN | VAL)])}),
    Case("tar-of-tiny-imagenet", TINY, TINY_VAL, packed=True, files={"tiny.tar": tar_of(
        [(f"./tiny/{p}", png_of(p)) for p in TINY | TINY_VAL] + [(f"tiny/{p}", c) for p, c in (TINY_LIST | TINY_TEXTS).items()])}),
    Case("tar-of-folders-by-layout", TWO_LEVELS, packed=True, options=layout("*/{class}"),
         files={"set.tar": shard(TWO_LEVELS, label="")}),
    # Tables beside the images.
    Case("metadata-in-train", *HF, HF_TABLES),
    Case("metadata-in-json", *HF, {"train/metadata.jsonl": json_lines(HF[0]), "validation/metadata.jsonl": json_lines(HF[1])}),
    Case("metadata-in-json-at-the-root", each("{n}.png"), files={"metadata.jsonl": json_lines(each("{n}.png"), "category")}),
    Case("metadata-in-json-of-digits-that-are-names", each("train/{n}.png", ("10", "9")),
         files={"train/metadata.jsonl": json_lines(each("train/{n}.png", ("10", "9")))}),
    Case("metadata-in-json-of-an-export", ROOT, files={"metadata.jsonl": json_lines(ROOT)}),
    Case("metadata-above-images", each("train/images/{c}{i}.png"),
         files={"train/metadata.csv": lines(each("train/images/{c}{i}.png"), "images/{name},{c}", "file_name,label")}),
    Case("metadata-beside-classes", TRAIN, options={"format": "imagefolder"}, files={"train/metadata.csv": X}),
    Case("metadata-instead-of-classes", each("train/{c}/{i}.png"), options={"format": "csv"},
         files={"train/metadata.csv": lines(TRAIN, "{c}/{name},{c}", "file_name,label")}),
    Case("labels-at-the-root", each("train/{n}.png"),
         files={"labels.csv": lines(each("train/{n}.png"), "{path},{c}", "path,label")}),
    # What is no image, and what is one.
    Case("junk", TRAIN, VAL, {name: png_of(name) for name in JUNK}),
    Case("endings-of-jpeg", {f"{c}/{i}{e}": c for c in NAMES for i, e in enumerate((".jfif", ".jpe", ".JPG", ".Jpeg"))}),
    Case("no-ending", each("{c}/img_{i}")),
    Case("number-as-ending", each("{c}/img_{i}.05")),
    Case("no-ending-beside-others", {**ROOT, **each("{c}/img_{i}")}, files={"ant/LICENSE": X}),
    Case("gif-and-jp2-are-bad", ROOT, files={"ant/9.gif": b"GIF89a" + X, "bee/9.jp2": b"\0\0\0\x0cjP  " + X}, bad=2),
    Case("jpeg-2000-without-ending-is-bad", ROOT, files={"ant/9": b"\0\0\0\x0cjP  " + X}, bad=1),
    Case("a-text-an-image", ROOT, files={path.replace("png", "xml"): X for path in ROOT}),
    Case("an-array-an-image-when-told", ROOT, files={path.replace("png", "npy"): X for path in ROOT},
         options={"max_passed_over": 0.5}),
    # Names of classes and folders.
    Case("a-class-called-train", {"car/0.png": "car", "train/0.png": "train"}),
    Case("a-class-called-as-a-file", {"ant.jpg/0.png": "ant.jpg", "0.png/0.png": "0.png"}),
    Case("classes-like-words-of-layouts", each("{c}/{i}.png", ("predator", "testament", "valley", "trainer"))),
    Case("unicode", {"Käfer/0.png": "Käfer", "蜂/0.png": "蜂"}),
    Case("braces-in-a-folder", each("set {{v1}}/{c}/{i}.png"), at="set {v1}"),
    Case("braces-in-a-class", {"{a,b}/0.png": "{a,b}", "{c}/0.png": "{c}"}),
    Case("classes-called-as-splits-below-splits", each("train/{c}/{i}.png", SPLIT_LIKE, 4), each("val/{c}/{i}.png", SPLIT_LIKE)),
    Case("a-class-called-train-in-two-splits", each("train/{c}/{i}.png", ("car", "train")),
         each("test/{c}/{i}.png", ("car", "train"))),
    Case("more-images-inside-a-class", {**ROOT, "ant/more/9.png": "ant"}),
    # Doubts that are settled.
    Case("one-class-when-told", {"ant/0.png": "ant"}, options=layout("{class}")),
    Case("upper-classes", UPPER, options=layout("{class}")),
    Case("lower-classes", TWO_LEVELS, options=layout("*/{class}")),
    Case("class-before-split", each("{c}/train/{i}.png"), each("{c}/test/{i}.png"), options=layout("{class}/{split}")),
    Case("class-in-the-file-name", CATS, "expected held-out images", options=layout("train/{class}.*")),
    Case("class-in-the-file-name-at-the-root", each("{c}.{i}.jpg"), options=layout("{class}.*")),
    Case("class-with-the-sign-before-numbers", DOGS, options=layout("images/{class}_{number}.*")),
    Case("number-before-the-class", each("{n}_{c}/0.png", ("big_dog", "dog")), options=layout("{number}_{class}")),
    Case("one-of-two-sizes", SIZES["full_size"], SIZES_VAL, images=SIZES["160px"],
         options=layout("full_size/{split}/{class}") | {"max_passed_over": 1}),
    Case("one-of-two-sizes-by-folder", SIZES["full_size"], SIZES_VAL, images=SIZES["160px"], at="full_size"),
    Case("lists-that-are-not-meant", FOOD, files=FOOD_FILES, options=layout("images/{class}")),
    Case("flat-val-that-is-not-meant", TRAIN, "expected held-out images", images=each("val/{n}.png"),
         options=layout("train/{class}")),
    Case("layout-of-training-images-alone", TRAIN, each("other/{c}/{i}.png"),
         options=layout("train/{class}") | {"max_passed_over": 0.5}, val_at="other"),
    Case("only-what-lies-right-in-a-class", ROOT, images=each("{c}/thumbs/{i}.png"),
         options=layout("{class}/*") | {"max_passed_over": 0.5}),
    # Archives and arrays.
    Case("webdataset", DOTS | each("k{n}.png"), files=NAMED | {"a.tar": shard(each("k{n}.png"))} | {"b.tar": shard(DOTS)},
         packed=True,
         options={"tar_keys": "last-dot"}),
    Case("webdataset-JPG-jfif", each("{n}{c}.JPG") | each("{n}{c}.jfif"), packed=True,
         files=NAMED | {"a.tar": shard(each("{n}{c}.JPG")), "b.tar": shard(each("{n}{c}.jfif"))}),
    Case("webdataset-in-dot", each("./{n}.png"), files=NAMED | {"a.tar": shard(each("./{n}.png"))}, packed=True),
    Case("webdataset-thumbnails", each("{n}.png"), packed=True,
         files=NAMED | {"a.tar": tar_of([(p.replace("png", e), b) for p, c in each("{n}.png").items() for e, b in (
             ("png", png_of(p)), ("thumb.png", X), ("cls", b"%d" % NAMES.index(c)), ("txt", X))])}),
    Case("webdataset-dots-first", each("{n}.png"), options={"tar_keys": "first-dot"}, packed=True,
         files=NAMED | {"a.tar": tar_of([(p.replace("png", e), b) for p, c in each("{n}.png").items() for e, b in (
             ("png", png_of(p)), ("cls", b"%d" % NAMES.index(c)), ("seg.png", X), ("seg.json", X))])}),
    Case("webdataset-junk", each("{n}.png"), packed=True,
         files=NAMED | {"a.tar": shard(each("{n}.png")), "b.tar": tar_of([("._1.png", X), ("@eaDir/1.png", X), ("README", X)])}),
    Case("webdataset-two-images-a-key", each("{n}.png"), bad=1, packed=True,
         files=NAMED | {"a.tar": shard(each("{n}.png")), "b.tar": tar_of([("x.png", X), ("x.jpg", X), ("x.cls", b"0")])}),
    Case("webdataset-of-timm", each("{n}.png"), packed=True, files=NAMED | {"t-train-0000.tar": shard(each("{n}.png")),
         "_info.json": b'{"splits": {"train": {"filenames": ["t-train-{0000..0000}.tar"], "shard_lengths": [6]}}}'}),
    Case("parquet", HALVES[0], files={"data/train-0.parquet": table(HALVES[0]), "README.md": X}, packed=True),
    Case("parquet-in-numbered-folders", HALVES[0] | HALVES[1], packed=True,
         files={"train/00/x.parquet": table(HALVES[0]), "train/01/x.parquet": table(HALVES[1])}),
    Case("parquet-one-of-two-configurations", HALVES[0], packed=True, options=layout("a/*"),
         files={"a/train.parquet": table(HALVES[0]), "b/train.parquet": table(HALVES[1])}),
    Case("parquet-all-configurations-when-told", HALVES[0] | HALVES[1], packed=True, options=layout("*/*"),
         files={"a/train.parquet": table(HALVES[0]), "b/train.parquet": table(HALVES[1])}),
]  # fmt: skip

REFUSED = [
    Case("class-with-the-sign-of-the-layout", "class of images/american_bulldog_0.jpg may be 'american' or 'american_bulldog'.*"
         r"'images/{class}_{number}\.\*', or write labels.csv", images=DOGS, options=layout("images/{class}_*")),
    Case("class-with-the-sign-after-a-star", r"class of 1_big_dog/0.png may be 'dog' or 'big_dog'.*'{number}_{class}/\*'",
         images=each("{n}_{c}/0.png", ("big_dog", "cat")), options=layout("*_{class}/*")),
    Case("tars-of-which-one-is-left-out", "1 files are no images of a class, beside 1 that are read: 1 x .tar .no image: more.tar",
         files={n: tar_of([(f"{c}.tar", t) for c, t in CLASS_TARS.items()]) for n in ("train.tar", "more.tar")}),
    Case("one-class", "all 2 images lie in one folder, ant/, which makes one class.*--source.layout '{class}'",
         images=each("{c}/{i}.png", ("ant",))),
    Case("one-class-in-train", "all 2 images .* train/ant/, .*--source.layout 'train/{class}'",
         images=each("train/{c}/{i}.png", ("ant",))),
    Case("flat", "found 6 other files .*6 x .png", images=each("{n}.png")),
    Case("class-in-the-name", r"all 6 images lie in one folder, train/.*--source.layout 'train/{class}\.\*'", images=CATS),
    Case("split-words-as-classes", "all 6 images lie in one folder, train/",
         images={**each("train/{n}.png"), **each("test/{n}.png")}),
    Case("two-levels", r"two levels down, in folders such as 'tame/cat', 'wild/ant'.*2 or the lower 3.*'{class}'.*'\*/{class}'",
         images=TWO_LEVELS),
    Case("two-levels-in-train", r"'train/{class}'.*'train/\*/{class}'",
         images={f"train/{path}": c for path, c in TWO_LEVELS.items()}),
    Case("domains", "images lie two levels down.*'photo/ant'", images=each("photo/{c}/{i}.png") | each("sketch/{c}/{i}.png")),
    Case("thumbnails-in-every-class", r"every class holds a folder 'thumbs' beside its images.*'{class}/\*'",
         images=ROOT | each("{c}/thumbs/{i}.png")),
    Case("uneven", "some folders hold images and others folders of images: 'more'", images=ROOT | each("more/{c}/{i}.png")),
    Case("class-before-split-untold", "each of 'ant', 'bee', 'cat' holds folders of splits .'test', 'train'.*'{class}/{split}'",
         images=each("{c}/train/{i}.png") | each("{c}/test/{i}.png")),
    Case("sizes-side-by-side",
         "each of '160px', 'full_size' holds folders of splits.*sizes.*'160px/{split}/{class}'.*--data.*/160px",
         images=SIZES["full_size"] | SIZES["160px"] | SIZES_VAL),
    Case("data-sets-side-by-side", "each of 'one', 'two' holds folders of splits",
         images=each("one/train/{c}/{i}.png") | each("two/val/{c}/{i}.png")),
    Case("data-set-twice", r"folders of images lie beside those of the splits.*'chest'.*'{split}/{class}'",
         images=TRAIN | VAL | each("chest/train/{c}/{i}.png")),
    Case("extra", "beside those of the splits.*'extra'", images=TRAIN | each("extra/{c}/{i}.png")),
    Case("two-folders-of-one-split", "2 folders may hold the images of one split: 'train', 'training'",
         images=TRAIN | each("training/{c}/{i}.png")),
    Case("dev-and-val", TRAIN, "2 folders may hold the images of one split: 'dev', 'val'",
         images=VAL | each("dev/{c}/{i}.png")),
    Case("images-and-masks", "'images', 'masks' beside nothing else would be taken for classes",
         images=each("images/{n}.png") | each("masks/{n}.png")),
    Case("unlabeled-beside-classes", "'unlabeled' beside 'ant', 'bee', 'cat' would be taken for classes",
         images=ROOT | each("unlabeled/{n}.png")),
    Case("voc", "'JPEGImages', 'SegmentationClass' beside nothing else",
         images=each("JPEGImages/{n}.jpg") | each("SegmentationClass/{n}.png")),
    Case("yolo", "all 6 images lie in one folder, train/images/", images=each("train/images/{n}.jpg"),
         files={"train/labels/1.txt": b"0 1 1 1 1"}),
    Case("yolo-by-kind", "all 6 images lie in one folder, images/train/",
         images=each("images/train/{n}.jpg") | each("images/val/{n}.jpg")),
    Case("unread-lists", "what may say otherwise is not read: 'meta/test.txt', 'meta/train.txt'.*'images/{class}'.*labels.csv",
         images=FOOD, files=FOOD_FILES),
    Case("unread-annotations", "is not read: 'annotations.json'", images=ROOT, files={"annotations.json": b"{}"}),
    Case("flat-val", TRAIN, r"6 held-out images lie in one folder, val/, .*no file says their classes.*'train/{class}'.*val_ann",
         images=each("val/{n}.png")),
    Case("flat-val-of-numbers", WNID_TRAIN, "val.txt says '0', '1', '2', which are none of the 3 classes, and no classes.txt",
         {"val.txt": lines(FLAT, "{name} {k}", classes=WNIDS)}, images=FLAT),
    Case("flat-val-of-other-classes", WNID_TRAIN, "val.txt says 'n09', which is none of the 3 classes",
         {"val.txt": lines(FLAT, "{name} n09")}, images=FLAT),
    Case("flat-val-of-a-class-that-begins-as-another", PANDAS_TRAIN, "val.txt says 'red fox', which is none of the 3 classes",
         {"val.txt": lines(PANDAS, "{name}\t{c}").replace(b"\tcat", b"\tred fox")}, images=PANDAS),
    Case("flat-val-named-in-part", WNID_TRAIN, "4 of 6 images are not named in val.txt, --source.max-bad-images allows 3",
         {"val.txt": lines(dict([*FLAT.items()][:2]), "{name} {c}")}, images=FLAT, options={"max_bad_images": 3}),
    Case("flat-val-named-twice", WNID_TRAIN, "names ILSVRC2012_val_00000001.JPEG with two classes, 'n01443537' and 'n01629819'",
         {"val.txt": lines(FLAT, "{name} {c}") + b"ILSVRC2012_val_00000001.JPEG n01629819\n"}, images=FLAT),
    Case("flat-val-with-lists-that-differ", WNID_TRAIN, "found lists that differ: 'val.txt', 'val2.txt'; take away",
         {"val.txt": lines(FLAT, "{name} {c}"), "val2.txt": lines(FLAT, "{name} " + WNIDS[0])}, images=FLAT),
    Case("ground-truth-alone", WNID_TRAIN, "holds ids of ILSVRC, and meta.mat, which says what they are, is not beside it",
         GROUND_TRUTH, images=FLAT),
    Case("ground-truth-of-others", WNID_TRAIN, "expected an id a line .* found otherwise .ValueError: 6 images, 2 lines",
         dict.fromkeys(GROUND_TRUTH, b"1\n2\n") | META, images=FLAT),
    Case("ground-truth-with-garbage", WNID_TRAIN, "expected an id a line .* found otherwise",
         GROUND_TRUTH | {DEVKIT + "meta.mat": X * 99}, images=FLAT),
    Case("metadata-and-classes", "both folders and train/metadata.csv may say the classes.*--source.format csv", images=TRAIN,
         files={"train/metadata.csv": lines(TRAIN, "{c}/{name},{c}", "file_name,label")}),
    Case("layout-of-nothing", "expected images at --source.layout 'x/{class}', found 6 elsewhere, such as 'ant/0.png'",
         images=ROOT, options=layout("x/{class}")),
    Case("layout-without-class", "expected {class} in the layout of folders of images, got 'train/x'", images=ROOT,
         options=layout("train/x")),
    Case("layout-of-a-table", "--source.layout: expected none for a table of paths and labels", images=each("a/{n}.png"),
         files={"labels.csv": lines(each("a/{n}.png"), "{path},{c}", "path,label")}, options=layout("a/{class}")),
    Case("captions-in-json", "expected a header with a column of paths .* found 'file_name', 'text'; name them by --source",
         images=each("train/{n}.png"), files={"train/metadata.jsonl": b'{"file_name": "1.png", "text": "an ant"}\n'}),
    Case("metadata-in-broken-json", "metadata.jsonl: line 2 is malformed .*expected a JSON object a line",
         images=each("train/{n}.png"), files={"train/metadata.jsonl": b'{"file_name": "1.png", "label": "ant"}\n["x"]\n'}),
    Case("metadata-in-json-and-classes", "both folders and train/metadata.jsonl may say the classes", images=TRAIN,
         files={"train/metadata.jsonl": json_lines(TRAIN)}),
    Case("layout-that-is-none", "--source.layout: expected a path below --data", images=ROOT, options=layout("{label}/x")),
    Case("layout-outside", "--source.layout: expected a path below --data", images=ROOT, options=layout("../{class}")),
    Case("loose-images",
         "6 files are no images of a class, beside 6 .*: 6 x .png .an image of no class.*--source.max-passed-over allows 25%",
         images=ROOT | each("{n}.png")),
    Case("arrays", r"3 files are no images of a class, beside 6 .*3 x .npy in ant/ .no image: ant/0.npy", images=ROOT,
         files={f"ant/{i}.npy": X for i in range(3)}),
    Case("unknown-kinds", "4 x .raw in ant/ .no image", images=ROOT, files={f"ant/{i}.raw": X for i in range(4)}),
    Case("parquet-configurations", r"files of one split lie in 2 folders: a/ .1., b/ .1.*--source.layout .'\*/\*'",
         files={"a/train.parquet": table(HALVES[0]), "b/train.parquet": table(HALVES[1])}),
    Case("tars-of-two-sizes", "files of one split lie in 2 folders: a/ .1., b/ .1.",
         files=NAMED | {"a/0.tar": shard(HALVES[0]), "b/0.tar": shard(HALVES[1])}),
    Case("tar-of-images", "holds images .'000.png'.*nothing says their classes.*unpack it",
         files={"images.tar": shard({"000.png": "ant", "001.png": "ant"}, label="")}),
    Case("ilsvrc-val-tar-without-the-devkit", ALL_OF_WNID,
         r"6 held-out images lie in one folder, val/, .* no file says their classes .*devkit_t12.tar.gz, which has it, is not "
         "read: unpack it by tar -xzf ILSVRC2012_devkit_t12.tar.gz in ", packed=True,
         files={"ILSVRC2012_img_train.tar": tar_of([(f"{n}.tar", c) for n, c in WNID_TARS.items()]),
                "ILSVRC2012_img_val.tar": shard(FLAT_VAL, label=""), "ILSVRC2012_devkit_t12.tar.gz": X}),
    Case("ilsvrc-val-tar-by-itself", ALL_OF_WNID,
         "lists that lie beside ILSVRC2012_img_val.tar are read where their folder is passed", packed=True,
         val_at="ILSVRC2012_img_val.tar",
         files={"ILSVRC2012_img_train.tar": tar_of([(f"{n}.tar", c) for n, c in WNID_TARS.items()]),
                "ILSVRC2012_img_val.tar": shard(FLAT_VAL, label=""), **BACKWARDS, **META}),
    Case("tars-with-files-of-one-name", "expected each file once, found 'ant/0.png' in a.tar and in b.tar; unpack them",
         files={f"{k}.tar": shard(IN_TARS[0], label="") for k in "ab"}),
    Case("tar-of-two-levels", r"images lie two levels down.*'{class}', or by --source.layout '\*/{class}'",
         files={"set.tar": shard(TWO_LEVELS, label="")}),
    Case("tar-with-loose-images", "6 files are no images of a class, beside 6 .*--source.max-passed-over allows 25%",
         files={"set.tar": shard(IN_TARS[0] | each("{n}.png"), label="")}),
    Case("archive-of-a-benchmark", "found 1 other files .1 x .tgz.* unpack imagenette2.tgz and pass the folder of its images",
         files={"imagenette2.tgz": X}),
    Case("archive-of-kaggle", "unpack archive.zip and pass the folder", files={"archive.zip": X, "README.md": X}),
    Case("shards-without-labels", "nothing says their classes",
         files={f"s-{i}.tar": shard({f"{i}.png": "ant"}, label="") for i in range(3)}),
    Case("keys-with-dots", "img_001.05 with its label is a sample if keys end at the last dot.*--source.tar-keys last-dot or",
         files=NAMED | {"a.tar": shard(DOTS)}),
]  # fmt: skip
