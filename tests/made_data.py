"""Synthetic images and small synthetic data sets in their publishers' layouts. The repository holds no patient data."""

import csv
import io
import struct
import zlib

import numpy as np
from PIL import Image


def grey_image(seed=0, side=64):
    """A smooth random grey image with a light column on a dark field, uint8 (side, side)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(40, 140, (6, 6), dtype=np.uint8))
    grey = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(int)
    grey[:, side * 7 // 16 : side * 9 // 16] += 90
    return grey.clip(0, 255).astype(np.uint8)


def save(path, seed=0, side=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey_image(seed, side)).save(path)
    return path


def encoded(image, kind="PNG", **options):
    """The bytes of a Pillow image as a file of this kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def dicom(values, stored=16, photometric="MONOCHROME2", **elements):
    """The bytes of a DICOM file with grey values (uint16, int16 or uint8). Needs pydicom.

    Args: stored: BitsStored; elements: further header elements by keyword.
    """
    import pydicom

    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    header.Rows, header.Columns = values.shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, photometric
    header.BitsAllocated, header.BitsStored, header.HighBit = values.itemsize * 8, stored, stored - 1
    header.PixelRepresentation = int(values.dtype.kind == "i")
    for name, value in elements.items():
        setattr(header, name, value)
    header.PixelData = values.tobytes()
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, header, enforce_file_format=True)
    return buffer.getvalue()


def png_16_bit(values, colour_type, *before_pixels):
    """A 16-bit PNG, written by hand: colour type 0 grey, 2 RGB, 4 grey + alpha, 6 RGBA. values: (H, W, C) uint16."""
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", header), *before_pixels, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def write_csv(path, header, rows, delimiter=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def folder(root, n=30, images_per_patient=1):
    """``n`` images with metadata.csv: file_name, patient_id, age, sex, view, finding, text."""
    findings = ("Edema|Effusion", "Edema", "No Finding")
    rows = []
    for i in range(n):
        name = f"images/{i:03}.png"
        save(root / name, seed=i)
        patient, sex, finding = f"p{i // images_per_patient}", "MF"[i % 2], findings[i % 3]
        rows.append([name, patient, 30 + i, sex, "PA", finding, f"a chest x-ray, number {i}"])
    write_csv(root / "metadata.csv", ["file_name", "patient_id", "age", "sex", "view", "finding", "text"], rows)
    return root


PADCHEST = [  # the first column has no name
    "",
    "ImageID",
    "ImageDir",
    "StudyDate_DICOM",
    "PatientID",
    "PatientBirth",
    "PatientSex_DICOM",
    "ViewPosition_DICOM",
    "Projection",
    "Pediatric",
    "Modality_DICOM",
    "Report",
    "MethodLabel",
    "Labels",
    "Localizations",
]


def padchest(root, images=True):
    """A complete row, a lateral view, a child, one of the files known to be broken, and a row with missing values."""
    broken = "216840111366964013829543166512013353113303615_02-092-190.png"
    granuloma = [
        "sin hallazg .",
        "Physician",
        "['calcified granuloma', ' calcified granuloma', '']",
        "['loc right upper lobe']",
    ]
    normal = ["Physician", "['normal']", "[]"]
    pattern = ["RNN_model", "['alveolar pattern', 'exclude']", "['loc  tracheal, loc  left']"]
    rows = [
        ["0", "a_1.png", "0.0", "20140915", "7", "1967.0", "M", "POSTEROANTERIOR", "PA", "No", "DX", *granuloma],
        ["1", "a_2.png", "0.0", "20140915", "7", "1967.0", "M", "LATERAL", "L", "No", "DX", "", *normal],
        ["2", "b_1.png", "1.0", "20160422", "8", "2011.0", "F", "", "AP_horizontal", "PED", "CR", "", *pattern],
        ["3", broken, "1.0", "20100101", "9", "1950.0", "M", "", "PA", "No", "CR", "", "RNN_model", "", ""],
        ["4", "c_1.png", "1.0", "20100101", "10", "nan", "None", "", "PA", "No", "CR", "", "RNN_model", "", ""],
    ]
    write_csv(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", PADCHEST, rows)
    if images:
        for seed, name in enumerate(("0/a_1.png", "0/a_2.png", "1/b_1.png", "1/c_1.png")):
            save(root / name, seed)
    return root


def montgomery(root):
    readings = {
        "0001_0": "Patient's Sex: F \r\nPatient's Age: 032Y\r\nnormal\r\n",
        "0113_1": "Patient's Sex: F \nPatient's Age: 084Y\n\nmiliary nodules;\nright effusion\n",
        "0117_1": "Patient's Sex: F \nPatient's Age: 085Y\nstable CXR since 6M (same pt as MCUCXR_0113_1)\n",
        "0166_1": "Patient's Sex: O \nPatient's Age: 049Y\nNO REPORT (same pt as MCUCXR_0113_1)\n",
    }
    for seed, (name, reading) in enumerate(readings.items()):
        save(root / "MontgomerySet" / "CXR_png" / f"MCUCXR_{name}.png", seed)
        save(root / "MontgomerySet" / "ManualMask" / "leftMask" / f"MCUCXR_{name}.png", seed)
        path = root / "MontgomerySet" / "ClinicalReadings" / f"MCUCXR_{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(reading.encode())
    return root


def iu_kaggle(root):
    write_csv(
        root / "indiana_reports.csv",
        ["uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression"],
        [
            [1, "normal", "normal", "Xray Chest PA and Lateral", "Cough.", "None.", "Lungs are\nclear.", "Normal."],
            [2, "Cardiomegaly", "Cardiomegaly;Lung", "PA", "", "", "", "Cardiomegaly."],
        ],
    )
    write_csv(
        root / "indiana_projections.csv",
        ["uid", "filename", "projection"],
        [
            [1, "1_IM-0001-4001.dcm.png", "Frontal"],
            [1, "1_IM-0001-3001.dcm.png", "Lateral"],
            [2, "2_IM-0652-1001.dcm.png", "Frontal"],
        ],
    )
    for seed, name in enumerate(("1_IM-0001-4001", "1_IM-0001-3001", "2_IM-0652-1001")):
        save(root / "images" / "images_normalized" / f"{name}.dcm.png", seed)
    return root


def patch_gastric(root):
    slides = {"a" * 32: "Signet ring cell carcinoma", "b" * 32: "Papillary adenocarcinoma"}
    write_csv(
        root / "captions.csv",
        ["id", "subtype", "text"],
        [[slide, kind, f"Cells of {kind.lower()}."] for slide, kind in slides.items()],
    )
    for slide in (*slides, "c" * 32):
        for k in range(2):
            save(root / "patches_captions" / f"{slide}_{k}f3.jpg", k)
    return root


def mimic(root):
    write_csv(
        root / "mimic-cxr-2.0.0-metadata.csv",
        ["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns"],
        [
            ["d1", 10000032, 50414267, "PA", 64, 64],
            ["d2", 10000032, 50414267, "LATERAL", 64, 64],
            ["d3", 10000764, 57375967, "AP", 64, 64],
            ["d4", 10000764, 57375968, "", 64, 64],
        ],
    )
    write_csv(
        root / "mimic-cxr-2.0.0-chexpert.csv",
        ["subject_id", "study_id", "Edema", "No Finding", "Pneumonia"],
        [[10000032, 50414267, "", "1.0", ""], [10000764, 57375967, "1.0", "", "-1.0"]],
    )
    names = ("10000032/s50414267/d1", "10000032/s50414267/d2", "10000764/s57375967/d3", "10000764/s57375968/d4")
    for seed, name in enumerate(names):
        save(root / "files" / "p10" / f"p{name}.jpg", seed)
    report = root / "files" / "p10" / "p10000032" / "s50414267.txt"
    report.write_text(
        "            FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n\n INDICATION:  ___F with cough\n\n"
        " FINDINGS: \n \n There is no focal consolidation.\n The heart is normal: no change.\n \n"
        " IMPRESSION: \n \n No acute process.\n",
        encoding="utf-8",
    )
    return root
