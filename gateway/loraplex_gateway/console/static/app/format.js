/** Numbers, sizes and times as text. */

const UNITS = ["B", "kB", "MB", "GB", "TB"];

/** @param {number} bytes @returns {string} such as "4.6 MB" */
export function size(bytes) {
  let value = bytes;
  let unit = 0;
  while (value >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit && value < 99.95 ? value.toFixed(1) : Math.round(value)} ${UNITS[unit]}`;
}

/** @param {number} value @returns {string} with thousands set apart */
export function count(value) {
  return Math.round(value).toLocaleString("en").replaceAll(",", "\u2009");
}

/** @param {number} value @returns {string} such as "23.4" or "1 204" */
export function rate(value) {
  return value < 99.95 ? value.toFixed(1) : count(value);
}

/** @param {number} value between 0 and 1 @returns {string} such as "83 %" */
export function percent(value) {
  const hundredth = 100 * value;
  if (hundredth > 0 && hundredth < 0.1) return "< 0.1 %";
  return `${hundredth < 9.95 ? hundredth.toFixed(1) : Math.round(hundredth)} %`;
}

/** @param {number} seconds @returns {string} such as "180 ms", "4.2 s" or "3 min 20 s" */
export function duration(seconds) {
  if (seconds < 0.9995) return `${Math.round(1000 * seconds)} ms`;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** @param {number} value @returns {string} with three significant digits, such as "0.0471" */
export function short(value) {
  if (value === 0) return "0";
  const large = Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5;
  return large ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

/** @param {number | null | undefined} time in seconds since 1970 @returns {string} date and time */
export function moment(time) {
  if (!time) return "never";
  return new Date(1000 * time).toLocaleString(undefined, {
    dateStyle: "medium",
    timeStyle: "short",
  });
}

/** @param {number | null | undefined} time in seconds since 1970 @returns {string} such as "2 min ago" */
export function ago(time) {
  if (!time) return "never";
  const seconds = Math.max(0, Date.now() / 1000 - time);
  if (seconds < 10) return "just now";
  if (seconds < 60) return `${Math.round(seconds)} s ago`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} d ago`;
}

/** @param {string} digest "sha256:" and 64 digits @returns {string} its first twelve digits */
export function shortDigest(digest) {
  return digest.replace(/^sha256:/, "").slice(0, 12);
}
