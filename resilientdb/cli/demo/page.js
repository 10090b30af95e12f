// Shows the figures of the half second under the pointer. The charts and the tables need none of this.
"use strict";
(() => {
  const slices = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const charts = [...document.querySelectorAll("svg.chart")];
  const hide = () => {
    tip.hidden = true;
    for (const chart of charts) chart.querySelector(".cursor").style.visibility = "hidden";
  };
  const show = (event, chart) => {
    const { left, right, width, end, slice: length } = chart.dataset;
    const box = chart.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    const seconds = ((x - left) / (right - left)) * end;
    const index = Math.min(slices.length - 1, Math.floor(seconds / length));
    if (seconds < 0 || x > right || index < 0) return hide();
    const slice = slices[index];
    tip.textContent =
      `${slice.t.toFixed(1)} s, ${slice.phase}\nplain: ${slice.plain}\nguarded: ${slice.guarded}`;
    tip.hidden = false;
    const beside = event.clientX + 16 + tip.offsetWidth > window.innerWidth;
    tip.style.left = `${beside ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16}px`;
    tip.style.top = `${event.clientY + 16}px`;
    for (const other of charts) {
      const cursor = other.querySelector(".cursor");
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.style.visibility = "visible";
    }
  };
  for (const chart of charts) {
    chart.addEventListener("pointermove", (event) => show(event, chart));
    chart.addEventListener("pointerleave", hide);
  }
})();
