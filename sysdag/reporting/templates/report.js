"use strict";
document.documentElement.classList.add("js");

const LEFT = 46, RIGHT = 430, WIDTH = 440;

function readCurve(group) {
  let step = 0;
  const steps = group.dataset.steps.split(" ").map((part, at) => (step = at ? step + Number(part) : Number(part)));
  const values = group.dataset.values.split(" ").map(Number);
  return { group, steps, values, label: group.dataset.label, evaluation: group.classList.contains("evaluation") };
}

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  return step - steps[low] <= steps[high] - step ? low : high;
}

function setUp(figure) {
  const svg = figure.querySelector("svg"), tip = figure.querySelector(".tip"), cursor = svg.querySelector(".cursor");
  const curves = [...svg.querySelectorAll(".curve")].map(readCurve);
  const first = Number(svg.dataset.first), last = Number(svg.dataset.last);

  for (const button of figure.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      for (const curve of curves) if (curve.label === button.dataset.label) curve.group.classList.toggle("off", !shown);
    });
  }

  function leave() {
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  }

  function point(event) {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH;
    const wanted = first + ((x - LEFT) / (RIGHT - LEFT)) * (last - first);
    const visible = curves.filter((curve) => !curve.group.classList.contains("off"));
    if (!visible.length) return leave();
    const found = visible.map((curve) => ({ curve, at: nearest(curve.steps, wanted) }));
    const step = found.map(({ curve, at }) => curve.steps[at]).reduce((a, b) => Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a);
    const at = LEFT + ((step - first) / (last - first)) * (RIGHT - LEFT);
    cursor.setAttribute("d", `M${at} 10V204`);
    cursor.setAttribute("visibility", "visible");
    const rows = [`step ${step.toLocaleString("en")}`];
    for (const { curve, at } of found) {
      const own = curve.steps[at], value = curve.values[at];
      const number = Number.isFinite(value) ? String(value).replace("-", "\u2212") : "not finite";
      const kind = curve.evaluation && visible.some((other) => other.label === curve.label && !other.evaluation) ? ", evaluation" : "";
      rows.push(`${curve.label}${kind}: ${number}${own === step ? "" : ` (step ${own.toLocaleString("en")})`}`);
    }
    tip.replaceChildren(...rows.map((row) => Object.assign(document.createElement("div"), { textContent: row })));
    tip.className = `tip ${at > WIDTH / 2 ? "left" : "right"}`;
    tip.hidden = false;
  }

  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", leave);
}

document.querySelectorAll("figure.chart").forEach(setUp);
