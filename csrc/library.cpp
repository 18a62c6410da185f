// annnet_kernels._C: the index of the native operators.
//
// Each operator fills outputs that Python has allocated (annnet_kernels/ops/registration.py), so no schema returns
// anything. The implementations are registered by device key beside their code, in cpu/<operator>.cpp
// and cuda/<operator>.cpp. A library without the CUDA part is the same without the files of cuda/.

#include <ATen/core/dispatch/Dispatcher.h>
#include <Python.h>
#include <torch/library.h>

#ifndef ANNNET_WITHOUT_CPU
#include "cpu/levels.h"
#endif
#include "pyramid_geometry.h"

TORCH_LIBRARY(annnet_native, m) {
  m.def("pyramid_pool(Tensor x, Tensor? norm, int[] heights, int[] widths, Tensor(a!) out) -> ()");
  m.def(
      "pyramid_pool_bwd(Tensor grad, Tensor? addend, int[] map_size, int[] heights, int[] widths, bool channels_last, "
      "Tensor(a!) dx) -> ()");
  m.def(
      "bn_relu_bwd_sums(Tensor y, Tensor norm, Tensor? grad_tokens, Tensor? grad_map, int[] heights, int[] widths, "
      "Tensor(a!) sums) -> ()");
  m.def(
      "bn_relu_bwd_input(Tensor y, Tensor norm, Tensor? grad_tokens, Tensor? grad_map, Tensor? sums, "
      "int count, int[] heights, int[] widths, Tensor(a!) dy) -> ()");
  m.def(
      "asymmetric_attention(Tensor query, Tensor? norm, Tensor key, Tensor value, Tensor? skip, Tensor? constant, "
      "float scale, bool statistics, Tensor(a!) out, Tensor(b!) logsumexp, Tensor(c!) moments) -> ()");
  m.def(
      "asymmetric_attention_bwd(Tensor grad_out, Tensor query, Tensor? norm, Tensor key, Tensor value, "
      "Tensor logsumexp, float scale, bool[] needs, Tensor(a!) dquery, Tensor(b!) dkey, Tensor(c!) dvalue) -> ()");
  m.def("batch_norm_moments(Tensor y, Tensor(a!) moments) -> ()");
  m.def(
      "batch_norm_table(Tensor y, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? conv_bias, float eps, "
      "Tensor(a!) table) -> ()");
  m.def(
      "batch_norm_update(Tensor y, Tensor? moments, Tensor? weight, Tensor? bias, Tensor? conv_bias, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? count, float eps, float? momentum, int calls, "
      "Tensor(d!) table) -> ()");
  m.def("batch_norm_apply(Tensor y, Tensor norm, Tensor? channel_scale, bool relu, Tensor(a!) out) -> ()");
  m.def(
      "batch_norm_bwd_sums(Tensor grad_out, Tensor y, Tensor norm, Tensor? channel_scale, bool relu, Tensor(a!) out) "
      "-> ()");
  m.def(
      "batch_norm_bwd_input(Tensor grad_out, Tensor y, Tensor norm, Tensor? channel_scale, bool relu, "
      "Tensor? sums, int count, Tensor(a!) dy) -> ()");
  m.def(
      "upsampled_cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
      "bool align_corners, bool per_pixel, bool gradient, Tensor(a!) losses, Tensor(b!) sums, "
      "Tensor(c!) unit_gradient) -> ()");
  m.def(
      "upsampled_cross_entropy_bwd(Tensor logits, Tensor target, Tensor? weight, Tensor grad, int ignore_index, "
      "float label_smoothing, bool align_corners, Tensor(a!) dlogits) -> ()");
  m.def("upsampled_argmax(Tensor logits, int[] size, bool align_corners, Tensor(a!) out) -> ()");
}

namespace {

#ifndef ANNNET_WITHOUT_CPU
PyObject* cpu_level(PyObject*, PyObject*) { return PyUnicode_FromString(annnet::level_name(annnet::chosen_level())); }

PyObject* processor_level(PyObject*, PyObject*) {
  return PyUnicode_FromString(annnet::level_name(annnet::processor_level()));
}

// Names of the levels in this library up to `highest`, lowest first.
PyObject* names_of_levels(annnet::Level highest) {
  PyObject* names = PyList_New(0);
  for (int i = 0; names != nullptr && i <= static_cast<int>(highest); ++i) {
    const auto level = static_cast<annnet::Level>(i);
    if (!annnet::is_built(level)) continue;
    PyObject* name = PyUnicode_FromString(annnet::level_name(level));
    if (name == nullptr || PyList_Append(names, name) != 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* built_levels(PyObject*, PyObject*) {
  return names_of_levels(static_cast<annnet::Level>(annnet::kLevels - 1));
}

PyObject* cpu_levels(PyObject*, PyObject*) { return names_of_levels(annnet::processor_level()); }
#endif

PyObject* parts(PyObject*, PyObject*) {
  const auto pooling = c10::Dispatcher::singleton().findSchemaOrThrow("annnet_native::pyramid_pool", "");
  const bool cpu = pooling.hasKernelForDispatchKey(c10::DispatchKey::CPU);
  const bool cuda = pooling.hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  if (cpu && cuda) return Py_BuildValue("(ss)", "cpu", "cuda");
  return cpu || cuda ? Py_BuildValue("(s)", cpu ? "cpu" : "cuda") : PyTuple_New(0);
}

PyObject* bin_edges(PyObject*, PyObject* args) {
  long long length, bins;
  if (!PyArg_ParseTuple(args, "LL", &length, &bins)) return nullptr;
  PyObject* edges = PyList_New(0);
  for (long long i = 0; edges != nullptr && i < bins; ++i) {
    PyObject* edge = Py_BuildValue("(LL)", static_cast<long long>(annnet::bin_start(i, length, bins)),
                                   static_cast<long long>(annnet::bin_end(i, length, bins)));
    if (edge == nullptr || PyList_Append(edges, edge) != 0) Py_CLEAR(edges);
    Py_XDECREF(edge);
  }
  return edges;
}

PyMethodDef methods[] = {
#ifndef ANNNET_WITHOUT_CPU
    {"cpu_level", cpu_level, METH_NOARGS, "Name of the instruction level that the CPU kernels use."},
    {"cpu_levels", cpu_levels, METH_NOARGS, "Names of the levels that can run here, lowest first."},
    {"built_levels", built_levels, METH_NOARGS, "Names of the levels in this library, lowest first."},
    {"processor_level", processor_level, METH_NOARGS, "Name of the highest level that this processor has."},
#endif
    {"bin_edges", bin_edges, METH_VARARGS, "pyramid.bin_edges(length, bins) as the C++ code computes it."},
    {"parts", parts, METH_NOARGS, "Device types with kernels in this library."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

#ifndef ANNNET_WITHOUT_CPU
// ANNNET_CPU_LEVEL lowers the level. False with a Python error set if it names none.
bool apply_environment() {
  const char* wanted = std::getenv("ANNNET_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') return true;
  annnet::Level level;
  if (!annnet::level_from_name(wanted, &level)) {
    PyErr_Format(PyExc_ValueError,
                 "environment variable ANNNET_CPU_LEVEL: expected baseline, avx2, avx512 or avx512_bf16, got '%s'",
                 wanted);
    return false;
  }
  annnet::choose_level(level);
  if (annnet::chosen_level() == level) return true;
  const char* const who = level > annnet::processor_level() ? "this processor" : "this build of annnet_kernels";
  return PyErr_WarnFormat(PyExc_RuntimeWarning, 1, "environment variable ANNNET_CPU_LEVEL: %s has no %s, using %s", who,
                          wanted, annnet::level_name(annnet::chosen_level())) == 0;
}
#else
bool apply_environment() { return true; }  // there are no levels to choose from
#endif

}  // namespace

PyMODINIT_FUNC PyInit__C() { return apply_environment() ? PyModule_Create(&module) : nullptr; }
