/** Line and area charts, drawn by uPlot in the page's colours. */

import { html, useEffect, useRef } from "../app/html.js";
import uPlot from "../vendor/uplot.mjs";
import { colour, onSchemeChange } from "./colours.js";

/**
 * @typedef {object} Line
 * @property {string} label
 * @property {string} colour name of a custom property, without its dashes
 * @property {boolean} [area] filled down to 0; later lines are drawn over earlier ones
 * @property {boolean} [stepped]
 * @property {boolean} [points]
 * @property {boolean} [dashed]
 * @property {(value: number) => string} [text] what the legend shows
 */

/**
 * @param {{label: string, lines: Line[], data: (number | null)[][], height?: number, axis?: (x: number) => string, range?: [number, number], most?: number, unit?: string, legend?: boolean}} props
 *   `data` has the x values, then those of each line; `most` is the least upper end of the y axis
 */
export function Chart({ label, lines, data, ...look }) {
  const frame = useRef(null);
  const plot = useRef(null);
  const latest = useRef(data);
  latest.current = data;
  const shape = JSON.stringify([
    lines.map((line) => [line.label, line.colour]),
    look.most,
    look.height,
  ]);

  useEffect(() => {
    const element = frame.current;
    const draw = () => {
      plot.current?.destroy();
      plot.current = new uPlot(
        optionsOf(element.clientWidth, lines, look),
        latest.current,
        element,
      );
    };
    draw();
    const sizes = new ResizeObserver(() =>
      plot.current?.setSize({ width: element.clientWidth, height: heightOf(look) }),
    );
    sizes.observe(element);
    const end = onSchemeChange(draw);
    return () => {
      end();
      sizes.disconnect();
      plot.current.destroy();
      plot.current = null;
    };
  }, [shape]);

  useEffect(() => {
    if (plot.current && plot.current.data !== data) plot.current.setData(data);
  }, [data]);

  return html`<figure class="chart" role="img" aria-label=${label}><div ref=${frame}></div></figure>`;
}

function heightOf({ height = 220 }) {
  return height;
}

/** @returns {object} uPlot's options */
function optionsOf(width, lines, look) {
  const text = colour("muted");
  const grid = { stroke: colour("line"), width: 1 };
  const font = `12px ${getComputedStyle(document.body).fontFamily}`;
  const axis = { stroke: text, grid, ticks: { show: false }, font, gap: 6 };
  return {
    width,
    height: heightOf(look),
    legend: { show: look.legend ?? true, live: true },
    cursor: { drag: { x: false, y: false }, points: { size: 6 } },
    scales: {
      x: { time: false, range: look.range },
      y: { range: (_, least, most) => rangeOf(least, most, look.most) },
    },
    axes: [
      {
        ...axis,
        grid: { show: false },
        size: 28,
        space: 70,
        values: look.axis && ((_, all) => all.map(look.axis)),
      },
      { ...axis, size: 52, values: (_, all) => all.map((value) => textOf(lines[0] ?? {}, value)) },
    ],
    series: [{ label: "Step", value: (_, value) => value ?? "" }, ...lines.map(seriesOf)],
  };
}

function rangeOf(least, most, floor) {
  if (floor !== undefined) return [0, Math.max(floor, most ?? 0)];
  if (least === null || most === null) return [0, 1];
  const room = (most - least || Math.abs(most) || 1) * 0.08;
  return [least - room, most + room];
}

/** @param {Line} line */
function seriesOf(line) {
  const stroke = colour(line.colour);
  return {
    label: line.label,
    stroke,
    width: line.area ? 0 : 1.75,
    fill: line.area ? stroke : undefined,
    dash: line.dashed ? [5, 4] : undefined,
    paths: line.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
    points: { show: line.points ?? false, size: 5 },
    spanGaps: true,
    value: (_, value) => textOf(line, value),
  };
}

function textOf({ text }, value) {
  if (value === null || value === undefined) return "";
  return text ? text(value) : String(value);
}
