"""Draw a synthetic frontal chest image: the anatomy, and one sign per finding.

Pixels are computed with ``+ - * /``, minima and comparisons only. These are exact to the last bit,
while ``sin``, ``exp`` and BLAS differ between numpy builds, so that an image is the same
everywhere. Scalars are Python floats, because numpy 1.x and 2.x promote ``np.float64`` scalars
differently.

Body coordinates: `across` runs from -1 (the patient's right, the viewer's left) to 1, `down` from
-1 (top) to 1, before the image is shifted, turned and scaled. Brightness: 0 is air, 1 is bone.
A side is -1 on the patient's right, 1 on the left. The extent of a finding is 0..1.
"""

from __future__ import annotations

import math
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from cxr_vit.data.labels import FINDINGS
from cxr_vit.data.nih import IMAGE_PIXELS

MIDLINE = 0.12  # half the width of the mediastinum
FLUID = 0.78  # brightness of tissue or fluid that has displaced the air
RIGHT_SHARE = 0.65  # of one-sided findings, on the patient's right
MASK_EDGE = 0.25  # a pixel belongs to a sign's region if more than this share of the sign shows

Box = Tuple[float, float, float, float]
Regions = List[np.ndarray]
Stream = np.random.Generator


class DrawnImage(NamedTuple):
    """An image and the boxes of its findings."""

    pixels: np.ndarray  # uint8 [size, size], 0 is black
    boxes: Dict[str, List[Box]]  # by finding; x, y, width, height on an image of 1024 x 1024


class Anatomy:
    """A patient's build, drawn at random and changed as the findings do; body coordinates."""

    def __init__(
        self, patient: Stream, view: str, extent: Dict[str, float], sides: Dict[str, int]
    ) -> None:
        dome = patient.uniform(0.42, 0.50) - (0.04 if view == "AP" else 0.0)
        self.dome = {-1: dome - 0.03, 1: dome + 0.03}  # down, top of the diaphragm, by side
        self.apex = patient.uniform(-0.76, -0.70)  # down, top of the lungs
        self.width = patient.uniform(0.68, 0.75)  # across, from the midline to the chest wall
        self.curvature = patient.uniform(0.9, 1.1)  # of the domes; 0 is flat
        self.heart_across = patient.uniform(0.10, 0.14)  # centre of the heart
        # Half the width of the heart.
        self.heart_radius = patient.uniform(0.25, 0.29) * (1.06 if view == "AP" else 1.0)
        self.lung = patient.uniform(0.26, 0.31)  # brightness of air-filled lung
        self.rib_phase = patient.uniform(0.0, 1.0)  # where the ribs start, in rib spacings
        if "Emphysema" in extent:
            low = dome + 0.14 + 0.08 * extent["Emphysema"]
            self.dome = {-1: low, 1: low}
            self.curvature, self.lung = 0.15, 0.14
            self.apex -= 0.03
            self.width += 0.03
            self.heart_radius *= 0.85
        if "Cardiomegaly" in extent:
            self.heart_radius += 0.15 + 0.08 * extent["Cardiomegaly"]
        if "Atelectasis" in extent:
            self.dome[sides["Atelectasis"]] -= 0.12 + 0.06 * extent["Atelectasis"]


class Scene:
    """An image being drawn, and the fields that its signs are made of, float32 ``[size, size]``."""

    def __init__(self, size: int, anatomy: Anatomy, pose: Sequence[float]) -> None:
        shift_across, shift_down, turn, growth = pose
        centres = ((np.arange(size) + 0.5) * (2.0 / size) - 1).astype(np.float32)
        across, down = centres[None, :], centres[:, None]
        cosine, sine = math.cos(turn) / (1 + growth), math.sin(turn) / (1 + growth)
        self.anatomy, self.pixel = anatomy, 2.0 / size
        self.across = cosine * (across - shift_across) + sine * (down - shift_down)
        self.down = cosine * (down - shift_down) - sine * (across - shift_across)
        self.lateral = np.abs(self.across)
        self.half = {-1: self.across <= 0, 1: self.across > 0}  # the patient's right and left
        taper = np.maximum(0.25 - self.down, 0) / (0.25 - anatomy.apex)
        self.wall = anatomy.width * (1 - 0.42 * taper * taper)  # position of the chest wall
        bow = (self.lateral - 0.30) * (self.lateral - 0.30)
        # Depth is the distance inside the ribs, lift the distance above the diaphragm.
        self.depth = np.minimum(self.wall - self.lateral, self.down - anatomy.apex - 1.2 * bow)
        dome = np.where(self.half[1], np.float32(anatomy.dome[1]), np.float32(anatomy.dome[-1]))
        self.lift = dome + anatomy.curvature * bow - self.down
        self.chest = self.ramp(self.depth) * self.ramp(self.lateral - MIDLINE)
        self.cavity = self.chest * self.ramp(self.lift)
        self.heart = self.blob(anatomy.heart_across, 0.22, anatomy.heart_radius, 0.33, 0.12)
        self.air = self.cavity * (1 - self.heart)
        self.image = np.zeros((size, size), dtype=np.float32)

    def ramp(self, distance: np.ndarray, width: float = 0.04) -> np.ndarray:
        """Step smoothly from 0 to 1 over `width`, centred where `distance` is 0."""
        step = np.clip(distance / max(width, 1.5 * self.pixel) + 0.5, 0, 1)
        return step * step * (3 - 2 * step)

    def blob(
        self, across: float, down: float, radius: float, height: float, edge: float = 1.0
    ) -> np.ndarray:
        """Return a filled ellipse; `edge` 0 is sharp, 1 is as soft as a cloud."""
        x, y = (self.across - across) / radius, (self.down - down) / height
        return self.ramp(1 - x * x - y * y, 2 * edge)

    def blend(self, mask: np.ndarray, brightness: float, strength: float = 1.0) -> Regions:
        """Blend the image with `brightness` where `mask` is 1; return the mask as the region."""
        self.image += strength * mask * (brightness - self.image)
        return [mask]

    def box(self, mask: np.ndarray) -> Box:
        """Return the bounds of a region that is not empty, on an image of 1024 x 1024."""
        columns, rows = (np.flatnonzero((mask > MASK_EDGE).any(axis=axis)) for axis in (0, 1))
        unit = IMAGE_PIXELS / mask.shape[0]
        left, top = int(columns[0]) * unit, int(rows[0]) * unit
        return left, top, (int(columns[-1]) + 1) * unit - left, (int(rows[-1]) + 1) * unit - top


def _wave(phase: np.ndarray) -> np.ndarray:
    """Return a smooth wave of period 1 between 0 and 1, without ``sin`` (see the module)."""
    fold = np.abs(phase - np.floor(phase) - 0.5) * 2  # 1, 0, 1
    return fold * fold * (3 - 2 * fold)


def _draw_body(scene: Scene) -> None:
    """Draw soft tissue, lungs, ribs, heart, spine and clavicles."""
    anatomy, image = scene.anatomy, scene.image
    trunk = scene.ramp(scene.down + 0.80 - 0.30 * scene.lateral * scene.lateral, 0.1)
    trunk *= scene.ramp(0.97 - scene.lateral, 0.06)
    image += 0.05 + 0.51 * np.maximum(trunk, scene.ramp(0.24 - scene.lateral, 0.08))
    image += 0.10 * scene.ramp(-scene.lift, 0.06) * scene.ramp(scene.depth, 0.1)  # the abdomen
    scene.blend(scene.cavity, anatomy.lung)
    arch = 0.9 * (scene.lateral - 0.35)
    ribs = _wave((scene.down + arch * arch) * 6.5 + anatomy.rib_phase)
    image += 0.07 * ribs * scene.ramp(scene.depth + 0.10, 0.06) * scene.ramp(scene.lift, 0.3)
    for hilum in (-0.20, 0.20):
        image += 0.10 * scene.blob(hilum, -0.06, 0.08, 0.12) * scene.air
    clavicle = scene.ramp(0.025 - np.abs(scene.down + 0.58 + 0.16 * scene.lateral), 0.03)
    image += 0.14 * clavicle * scene.ramp(scene.lateral - 0.1) * scene.ramp(0.75 - scene.lateral)
    scene.blend(scene.heart * scene.ramp(scene.lift + 0.05, 0.1), 0.70, 0.9)
    aorta = scene.blob(0.10, -0.33, 0.11, 0.11, 0.2)
    scene.blend(np.maximum(scene.ramp(MIDLINE - scene.lateral, 0.08), aorta), 0.68, 0.8)
    image += 0.07 * scene.ramp(0.06 - scene.lateral) * (0.5 + _wave(scene.down * 7.0))
    image -= 0.12 * scene.blob(0.36, anatomy.dome[1] + 0.17, 0.13, 0.07, 0.3)  # stomach air


# One function per finding: it draws the sign and returns its regions, float32 [size, size].
def _edema(scene: Scene, random: Stream, side: int, extent: float) -> Regions:
    """A haze around both hila, in the shape of a bat's wings."""
    down, wide = random.uniform(-0.10, 0.0), random.uniform(0.25, 0.28)
    right, left = (scene.blob(across, down, wide, 0.30) for across in (-0.26, 0.26))
    wings = scene.air * np.maximum(left, right)
    scene.image += (0.28 + 0.10 * extent) * wings
    return [wings]


def _infiltration(scene: Scene, random: Stream, side: int, extent: float) -> Regions:
    """Faint patches in the middle zone, on one side or both."""
    cloud = np.zeros_like(scene.image)
    for current in (side, -side) if random.random() < 0.4 else (side,):
        for _ in range(6):
            across, down = random.uniform(0.26, 0.58), random.uniform(-0.28, 0.18)
            cloud += scene.blob(current * across, down, 0.12, 0.11)
    cloud = np.minimum(cloud, 1) * scene.air
    scene.image += (0.26 + 0.08 * extent) * cloud
    return [cloud]


def _fibrosis(scene: Scene, random: Stream, side: int, extent: float) -> Regions:
    """A net of bright strands at both bases."""
    phase = random.uniform(0.0, 1.0)
    rising, falling = scene.across - scene.down, scene.across + scene.down
    net = np.maximum(_wave(rising * 5.0 + phase), _wave(falling * 5.0 + phase))
    base = scene.air * scene.ramp(0.42 + 0.08 * extent - scene.lift, 0.12)
    scene.image += (0.45 + 0.10 * extent) * net * net * base
    return [base]


def _pneumonia(scene: Scene, random: Stream, side: int, extent: float) -> Regions:
    """A dense patch with a fuzzy edge in the lower zone, streaked by the open bronchi."""
    across, down = side * random.uniform(0.40, 0.46), random.uniform(0.14, 0.24)
    radius = 0.24 + 0.04 * extent
    patch = scene.blob(across, down, radius, radius, 0.6) * scene.air
    spread = side * (scene.across - across) - 0.7 * (scene.down - down)
    scene.blend(patch * (1 - 0.85 * _wave(spread * 5.0)), 0.92)
    return [patch]


def _consolidation(scene: Scene, random: Stream, side: int, extent: float) -> Regions:
    """A dense lobe without air, with a straight edge at the fissure."""
    bottom = random.uniform(-0.32, -0.24) + 0.10 * extent
    lobe = scene.air * scene.half[side] * scene.ramp(bottom - scene.down + 0.15 * scene.lateral)
    return scene.blend(lobe, 0.68, 0.92)


def _effusion(scene: Scene, random: Stream, side: int, extent: float) -> Regions:
    """Fluid in the lower angle that rises along the chest wall and hides the diaphragm."""
    climb = scene.lateral / scene.wall
    surface = scene.anatomy.dome[side] - 0.02 - 0.16 * extent - 0.34 * climb * climb * climb
    fluid = scene.ramp(scene.lift + 0.15) * scene.ramp(scene.down - surface, 0.06)
    return scene.blend(fluid * scene.chest * scene.half[side] * (1 - scene.heart), FLUID, 0.95)


def _pneumothorax(scene: Scene, random: Stream, side: int, extent: float) -> Regions:
    """Air between lung and ribs: a black rim and the bright line of the pleura."""
    edge = 0.15 + 0.08 * extent
    upper = scene.half[side] * scene.ramp(0.15 + 0.15 * extent - scene.down, 0.2)
    rim = scene.blend(scene.cavity * upper * scene.ramp(edge - scene.depth), 0.02)
    scene.image += 0.40 * upper * scene.air * scene.ramp(0.018 - np.abs(scene.depth - edge), 0.03)
    return rim


def _pleural_thickening(scene: Scene, random: Stream, side: int, extent: float) -> Regions:
    """A bright band along the side of the chest wall."""
    band = scene.ramp(0.13 + 0.04 * extent - (scene.wall - scene.lateral), 0.03)
    band *= scene.ramp(scene.down + random.uniform(0.40, 0.50), 0.1)
    return scene.blend(band * scene.cavity * scene.half[side], 0.86, 0.95)


def _atelectasis(scene: Scene, random: Stream, side: int, extent: float) -> Regions:
    """A plate of collapsed lung across the lower zone, above a raised diaphragm."""
    height, slope = random.uniform(0.12, 0.18), random.uniform(-0.2, 0.2)
    above = np.abs(scene.lift - height - slope * (scene.lateral - 0.4))
    plate = scene.ramp(0.045 + 0.02 * extent - above, 0.03) * scene.air * scene.half[side]
    scene.blend(plate, 0.74, 0.9)
    raised = scene.ramp(-scene.lift) * scene.ramp(scene.lift + 0.15) * scene.chest
    return [np.maximum(plate, raised * scene.half[side])]


def _mass(scene: Scene, random: Stream, side: int, extent: float) -> Regions:
    """One large round opacity with a sharp edge."""
    across, down = side * random.uniform(0.36, 0.48), random.uniform(-0.34, 0.10)
    radius = 0.20 + 0.06 * extent
    return scene.blend(scene.blob(across, down, radius, radius, 0.25), FLUID, 0.95)


def _nodule(scene: Scene, random: Stream, side: int, extent: float) -> Regions:
    """One to three small round opacities."""
    regions, radius = [], 0.085 + 0.025 * extent
    for count in range(1 + int(random.integers(0, 3))):
        across = random.uniform(0.28, 0.54) * (side if count == 0 else -side)
        ball = scene.blob(across, random.uniform(-0.48, 0.20), radius, radius, 0.4)
        regions += scene.blend(ball, 0.95)
    return regions


def _hernia(scene: Scene, random: Stream, side: int, extent: float) -> Regions:
    """A bubble behind the heart: gas above, fluid below, with a straight level between."""
    across, down = random.uniform(0.02, 0.08), random.uniform(0.20, 0.28)
    radius = 0.25 + 0.05 * extent
    bubble = scene.blend(scene.blob(across, down, radius, radius, 0.15), 0.95)
    gas = scene.blob(across, down, 0.85 * radius, 0.85 * radius, 0.2)
    scene.blend(gas * scene.ramp(down + 0.04 - scene.down, 0.03), 0.04)
    return bubble


# In drawing order: clouds, then signs that displace the air, then small and sharp signs.
SIGNS: Dict[str, Callable[[Scene, Stream, int, float], Regions]] = {
    "Cardiomegaly": lambda scene, *_: [scene.heart * scene.ramp(scene.lift + 0.1)],
    "Emphysema": lambda scene, *_: [scene.cavity],  # Anatomy shapes these two
    "Edema": _edema,
    "Infiltration": _infiltration,
    "Fibrosis": _fibrosis,
    "Pneumonia": _pneumonia,
    "Consolidation": _consolidation,
    "Effusion": _effusion,
    "Pneumothorax": _pneumothorax,
    "Pleural_Thickening": _pleural_thickening,
    "Atelectasis": _atelectasis,
    "Mass": _mass,
    "Nodule": _nodule,
    "Hernia": _hernia,
}


def draw_image(
    findings: Sequence[str], *, size: int, seed: int, patient: int, follow_up: int, view: str = "PA"
) -> DrawnImage:
    """Draw one image, `size` pixels square, with any of the 14 findings; view "PA" or "AP".

    The same arguments draw the same image. Each sign has its own random stream, so that images with
    and without a finding differ in its sign only. A patient keeps the build, and the side of each
    finding, between follow-ups. Raises KeyError for an unknown finding.
    """
    unknown = set(findings) - set(SIGNS)
    if unknown:
        raise KeyError(", ".join(sorted(unknown)))
    image, shown = (seed, patient, follow_up), [name for name in SIGNS if name in findings]
    streams = {name: np.random.default_rng((*image, 1 + FINDINGS.index(name))) for name in shown}
    patient_random = np.random.default_rng((seed, patient, 0, 100))
    sides = {name: -1 if patient_random.random() < RIGHT_SHARE else 1 for name in FINDINGS}
    extent = {name: random.uniform(0.0, 1.0) for name, random in streams.items()}
    random = np.random.default_rng((*image, 0))
    pose = [random.uniform(-most, most) for most in (0.03, 0.03, 0.04, 0.03)]
    scene = Scene(size, Anatomy(patient_random, view, extent, sides), pose)
    _draw_body(scene)
    boxes = {}
    for name, stream in streams.items():
        regions = SIGNS[name](scene, stream, sides[name], extent[name])
        boxes[name] = [scene.box(region) for region in regions if (region > MASK_EDGE).any()]
    return DrawnImage(_expose(scene.image, random), boxes)


def _expose(image: np.ndarray, random: Stream) -> np.ndarray:
    """Add marker, exposure and noise; convert float32 brightness to uint8."""
    size = image.shape[0]
    top, left, arm, stroke = size // 16, size - size // 8, max(size // 20, 2), max(size // 64, 1)
    image[top : top + arm, left : left + stroke] = 0.9  # the letter L on the patient's left
    image[top + arm - stroke : top + arm, left : left + arm * 2 // 3] = 0.9
    gain, offset = random.uniform(0.92, 1.08), random.uniform(-0.03, 0.03)
    contrast, grain = random.uniform(-0.15, 0.15), random.uniform(0.015, 0.03)
    image = np.clip(image, 0, 1)
    image = gain * image + offset + contrast * image * (1 - image)
    image += grain * random.standard_normal(image.shape, dtype=np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
