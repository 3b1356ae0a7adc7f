// The functions that the module takes from elsewhere. 0, or a Python error is set.
#pragma once

#include <Python.h>

namespace vocabdistil {

int bind_operations(PyObject* module);
namespace cuda {
int bind_operations(PyObject* module);
}  // namespace cuda

}  // namespace vocabdistil
