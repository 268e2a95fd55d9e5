// The text of a page with the least contrast, and how much it has.
const light = (c) => { const [r, g, b] = c.map(v => { v /= 255;
  return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const colour = (text) => text.match(/[0-9.]+/g).map(Number);
const ground = (node) => { for (; node; node = node.parentElement) {
  const found = colour(getComputedStyle(node).backgroundColor);
  if (found.length === 3 || found[3] > 0) return found.slice(0, 3); } return [255, 255, 255]; };
return [...document.querySelectorAll('p, h1, h2, h3, th, td, dt, dd, li, button, caption, b, a')]
  .filter(node => node.offsetParent && node.textContent.trim()).map(node => {
    const [a, b] = [light(colour(getComputedStyle(node).color).slice(0, 3)), light(ground(node))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.outerHTML.slice(0, 90)]; })
  .sort((a, b) => a[0] - b[0])[0];
