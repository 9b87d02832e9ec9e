// Sets the colour scheme that the user has chosen before anything is painted. A classic script,
// since modules run after the first paint.
try {
  const chosen = localStorage.getItem("loraplex.scheme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.scheme = chosen;
} catch {
  // Storage may be forbidden; the system's scheme is used then.
}
