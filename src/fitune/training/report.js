// Values under the pointer: one step across all figures, read from each figure's data-chart.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";

  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] > step) high = middle; else low = middle;
    }
    return step - steps[low] <= steps[high] - step ? low : high;
  };

  const number = value => {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("e+", "e");
    return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  };

  const make = (parent, name, style) => {
    const node = document.createElementNS(SVG, name);
    node.setAttribute("class", style);
    node.setAttribute("visibility", "hidden");
    return parent.appendChild(node);
  };

  const charts = [...document.querySelectorAll("svg.plot")].map(svg => {
    const data = JSON.parse(svg.dataset.chart);
    const figure = svg.closest("figure");
    const rule = make(svg, "line", "rule");
    rule.setAttribute("y1", data.top);
    rule.setAttribute("y2", data.top + data.height);
    return {
      svg, data, rule,
      output: figure.querySelector("output"),
      values: [...figure.querySelectorAll(".legend b")],
      dots: data.series.map(series => make(svg, "circle", "dot " + series.style)),
      resting: null,
    };
  });
  if (!charts.length) return;
  for (const chart of charts) {
    chart.resting = [chart.output.textContent, ...chart.values.map(node => node.textContent)];
  }
  const every = charts[0].data.series[0].x;

  const show = step => {
    for (const { data, rule, output, values, dots } of charts) {
      const across = value => `${100 * (value - data.x[0]) / (data.x[1] - data.x[0])}%`;
      rule.setAttribute("x1", across(step));
      rule.setAttribute("x2", across(step));
      rule.setAttribute("visibility", "visible");
      output.textContent = `step ${step.toLocaleString("en")}`;
      data.series.forEach((series, i) => {
        const k = nearest(series.x, step), value = series.y[k];
        const height = ((data.log ? Math.log10(value) : value) - data.y[0]) / (data.y[1] - data.y[0]);
        // Held-out points are far apart: say where the one shown was taken.
        const where = series.style === "held" && series.x[k] !== step ? ` at ${series.x[k].toLocaleString("en")}` : "";
        values[i].textContent = number(value) + where;
        dots[i].setAttribute("cx", across(series.x[k]));
        dots[i].setAttribute("cy", data.top + data.height * (1 - height));
        dots[i].setAttribute("r", 3.5);
        dots[i].setAttribute("visibility", "visible");
      });
    }
  };

  const rest = () => {
    for (const { rule, output, values, dots, resting } of charts) {
      for (const node of [rule, ...dots]) node.setAttribute("visibility", "hidden");
      output.textContent = resting[0];
      values.forEach((node, i) => { node.textContent = resting[i + 1]; });
    }
  };

  let at = every.length - 1;
  for (const { svg, data } of charts) {
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      at = nearest(every, data.x[0] + share * (data.x[1] - data.x[0]));
      show(every[at]);
    });
    svg.addEventListener("pointerleave", rest);
    svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(every[at]); });
    svg.addEventListener("blur", rest);
    svg.addEventListener("keydown", event => {
      const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -every.length, End: every.length }[event.key];
      if (!move) return;
      event.preventDefault();
      at = Math.max(0, Math.min(every.length - 1, at + move));
      show(every[at]);
    });
  }

  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
