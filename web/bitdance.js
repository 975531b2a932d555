// What ComfyUI's page lacks for these nodes: the texts that they report stay on them, and older workflow files open.

import { app } from "../../scripts/app.js";

const NAME = "BitDance";
const TEXT = "bitdance_text"; // the widget
const PROGRESS_TEXT = "$$node-text-preview"; // the page's own, which newer pages remove when a job ends

function showText(node, lines) {
    const text = [lines ?? []].flat().join("\n");
    removeWidget(node, PROGRESS_TEXT); // it said the same while the node ran
    if (!text) return removeWidget(node, TEXT);
    const widget = node.widgets?.find((widget) => widget.name === TEXT) ?? addText(node);
    widget.element.textContent = text;
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
    node.setDirtyCanvas(true, true);
}

function addText(node) {
    const element = document.createElement("div");
    element.className = "bitdance-text";
    Object.assign(element.style, {
        overflow: "auto",
        padding: "4px 6px",
        whiteSpace: "pre-wrap",
        userSelect: "text",
        font: "12px/1.4 sans-serif",
        color: "var(--input-text)",
        background: "var(--comfy-input-bg)",
        borderRadius: "4px",
    });
    const widget = node.addDOMWidget(TEXT, "BITDANCE_TEXT", element, {
        serialize: false, // not in prompts
        hideOnZoom: false,
        getMinHeight: () => heightOf(node, element.textContent),
        getMaxHeight: () => 160,
    });
    widget.serialize = false; // nor in workflow files
    return widget;
}

// pixels, of 64 to 160, for a text that the canvas breaks at the node's width; what is more is scrolled to
function heightOf(node, text) {
    const perLine = Math.max(20, (node.size[0] - 40) / 6.5);
    const lines = text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / perLine)), 0);
    return Math.min(160, Math.max(64, 17 * lines + 12));
}

function removeWidget(node, name) {
    const widget = node.widgets?.find((widget) => widget.name === name);
    if (widget) node.removeWidget(widget);
}

// a node's id in a running graph: "5", or "12:5" inside of the subgraph node 12
function nodeOf(id) {
    let graph = app.rootGraph ?? app.graph, node;
    for (const part of String(id).split(":")) {
        node = graph?.getNodeById(part);
        graph = node?.subgraph;
    }
    return node;
}

// lists of models show size and card beside the names, which stay the values: node type -> input -> name -> label
const labels = {};

function readLabels(definitions) {
    for (const [type, definition] of Object.entries(definitions)) {
        if (!type.startsWith(NAME)) continue;
        labels[type] = {};
        for (const [name, input] of Object.entries(definition.input?.required ?? {}))
            if (input[1]?.labels) labels[type][name] = input[1].labels;
    }
}

function showLabels(node, type) {
    for (const widget of node.widgets ?? [])
        if (labels[type]?.[widget.name])
            widget.options.getOptionLabel = (value) => labels[type][widget.name]?.[value] ?? value ?? "";
}

// names that older workflow files have, and the list no longer shows, are right: Nodes 2.0 would mark them as wrong
function keepOldNames(node) {
    for (const widget of node.widgets ?? []) {
        const values = widget.options?.values;
        if (labels[node.type]?.[widget.name]?.[widget.value] && Array.isArray(values) && !values.includes(widget.value))
            widget.options.values = [...values, widget.value];
    }
}

// our text encode had an id that another pack has too: theirs has no input `clip`
function renameOldNodes(nodes) {
    for (const node of nodes ?? [])
        if (node.type === "BitDanceTextEncode" && node.inputs?.some((input) => input.name === "clip")) {
            node.type = "BitDancePrompt";
            if (node.properties?.["Node name for S&R"]) node.properties["Node name for S&R"] = node.type;
        }
}

// the page sorts nodes whose names begin with the words by how often they are used, and then by length; it counts the
// uses of packs that it knows
const USED_MOST = ["BitDanceLoadModel", "BitDanceNextPatchSampler", "BitDancePrompt"];

function countUses(definitions) {
    for (const definition of definitions) {
        const place = USED_MOST.indexOf(definition.name);
        if (place < 0) continue;
        definition.postProcessSearchScores = ([kind, ...scores]) =>
            kind <= 1 ? [kind, place - USED_MOST.length, ...scores] : [kind, 0, ...scores];
    }
}

if (!app.extensions.some((extension) => extension.name === NAME))
    app.registerExtension({
        name: NAME,
        beforeConfigureGraph(graph) {
            for (const { nodes } of [graph, ...(graph.definitions?.subgraphs ?? [])]) renameOldNodes(nodes);
        },
        beforeRegisterVueAppNodeDefs: countUses,
        setup() {
            app.api.addEventListener("bitdance.note", ({ detail }) => {
                const node = nodeOf(detail.node);
                if (node) showText(node, detail.text);
            });
        },
        addCustomNodeDefs: readLabels,
        refreshComboInNodes(definitions) {
            readLabels(definitions);
            for (const node of app.graph.nodes) keepOldNames(node);
        },
        loadedGraphNode: keepOldNames,
        beforeRegisterNodeDef(nodeType, definition) {
            if (!definition.name.startsWith(NAME)) return;
            const onNodeCreated = nodeType.prototype.onNodeCreated;
            nodeType.prototype.onNodeCreated = function () {
                onNodeCreated?.apply(this, arguments);
                showLabels(this, definition.name);
            };
            const onExecuted = nodeType.prototype.onExecuted;
            nodeType.prototype.onExecuted = function (output) {
                onExecuted?.apply(this, arguments);
                showText(this, output?.text);
            };
        },
    });
