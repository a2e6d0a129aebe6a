"""The report as one self-contained HTML file: findings, outlines over images, plots, contact sheets."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

from keygrip.data.robot.doctor.examination import NO_FAULTS, Examination, Finding

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:24px auto;padding:0 16px;color:#1c2128}
h1{font-size:24px}h2{font-size:19px;margin-top:32px;border-bottom:1px solid #d0d7de}
table{border-collapse:collapse;width:100%}
td,th{border:1px solid #d0d7de;padding:5px 9px;text-align:left}
.error{background:#ffebe9}.warning{background:#fff8c5}.good{color:#1a7f37}
figure{display:inline-block;margin:6px 10px 6px 0}figcaption{font-size:13px;color:#57606a}
img{max-width:100%}svg{background:#f6f8fa}
"""
QUALITY = 88
BAR, PLOT_HEIGHT, PLOT_WIDTH = 18, 120, 300


def html_report(exam: Examination, sheets: Mapping[str, Image.Image]) -> str:
    """Return the whole file as text.

    Args:
        exam: the examination after all checks. sheets: contact sheet of each camera.
    """
    measures = exam.measures
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>keygrip doctor</title>",
        f"<style>{STYLE}</style><h1>Doctor's report on {escape(str(measures.get('root', '')))}</h1>",
        f"<p>{measures.get('examined', 0)} of {measures.get('demos', 0)} demos examined, "
        f"{measures.get('readable', 0)} readable, format {escape(str(measures.get('format', '')))}.</p>",
        _findings_html(exam.findings, exam.notes),
    ]
    if exam.overlays:
        parts.append(
            "<h2>Robot over images</h2><p>Outline of the robot at the recorded poses: red with the recorded camera, "
            "green with the fitted one. Only green: both agree; only red: no fit was found.</p>"
        )
        parts += [_figure_html(image, caption) for caption, image in exam.overlays]
    for key, value in measures.items():
        if key.endswith("/agreement") and isinstance(value, dict):
            pair = key.removesuffix("/agreement").replace("camera/", "Camera ", 1).replace("/arm/", ", arm ")
            parts.append(f"<h2>{escape(pair)}</h2>")
            parts.append(_bar_chart("agreement of images and poses by demo (1 is perfect)", value))
            fit = measures.get(key.removesuffix("agreement") + "fit")
            curve = measures.get(key.removesuffix("agreement") + "agreement_by_lag")
            if isinstance(curve, dict):
                parts.append(_line_chart("agreement if images were so many frames later", curve))
            if isinstance(fit, dict):
                rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in fit.items())
                parts.append(f"<table><tr><th>fit of the camera</th><th></th></tr>{rows}</table>")
    for camera, sheet in sheets.items():
        parts.append(f"<h2>Contact sheet of camera {escape(camera)}</h2>{_image_html(sheet)}")
    return "\n".join(parts)


def _findings_html(findings: Sequence[Finding], notes: Sequence[Finding]) -> str:
    title = "<h2>Findings</h2>"
    if all(finding.check in NO_FAULTS for finding in findings):
        scope = " in what was compared" if findings or notes else ""
        title += f"<p class='good'>No fault found{scope}.</p>"
    if not (findings or notes):
        return title
    rows = []
    for finding in (*findings, *notes):
        frames = f"<br>frames {', '.join(map(str, finding.frames))}" if finding.frames else ""
        cells = (finding.severity, finding.check, finding.where, finding.cause, finding.what, finding.advice)
        escaped_cells = [escape(cell) for cell in cells]
        escaped_cells[2] += frames
        rows.append(
            f"<tr class='{escape(finding.severity)}'>{''.join(f'<td>{cell}</td>' for cell in escaped_cells)}</tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in ("", "check", "where", "likely cause", "measured", "what to do"))
    return f"{title}<table><tr>{head}</tr>{''.join(rows)}</table>"


def _image_html(image: Image.Image) -> str:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=QUALITY)
    return f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}'>"


def _figure_html(image: np.ndarray, caption: str) -> str:
    return f"<figure>{_image_html(Image.fromarray(image))}<figcaption>{escape(caption)}</figcaption></figure>"


def _bar_chart(title: str, values: Mapping[str, float]) -> str:
    rows = []
    for index, (name, value) in enumerate(values.items()):
        top, length = index * (BAR + 4) + 4, max(0.0, float(value)) * PLOT_WIDTH
        rows.append(
            f"<rect x='260' y='{top}' width='{length:.1f}' height='{BAR}' fill='#54aeff'/>"
            f"<text x='254' y='{top + 13}' text-anchor='end' font-size='12'>{escape(str(name)[-36:])}</text>"
            f"<text x='{265 + length:.1f}' y='{top + 13}' font-size='12'>{float(value):.2f}</text>"
        )
    height = len(rows) * (BAR + 4) + 8
    return (
        f"<figure><svg width='{PLOT_WIDTH + 320}' height='{height}'>{''.join(rows)}</svg>"
        f"<figcaption>{escape(title)}</figcaption></figure>"
    )


def _line_chart(title: str, values: Mapping[str, float]) -> str:
    x = np.array([float(key) for key in values])
    y = np.array([float(value) for value in values.values()])
    low, high = min(0.0, float(y.min())), max(float(y.max()), 0.1)
    plot_x = 30 + (x - x.min()) / max(np.ptp(x), 1e-6) * (PLOT_WIDTH - 40)
    plot_y = PLOT_HEIGHT - 20 - (y - low) / (high - low) * (PLOT_HEIGHT - 34)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(plot_x, plot_y, strict=True))
    marks = "".join(
        f"<text x='{a:.1f}' y='{PLOT_HEIGHT - 4}' font-size='11' text-anchor='middle'>{value:g}</text>"
        for a, value in zip(plot_x, x, strict=True)
    )
    return (
        f"<figure><svg width='{PLOT_WIDTH}' height='{PLOT_HEIGHT}'>"
        f"<polyline points='{points}' fill='none' stroke='#cf222e' stroke-width='2'/>{marks}"
        f"<text x='2' y='12' font-size='11'>{high:.2f}</text></svg><figcaption>{escape(title)}</figcaption></figure>"
    )
