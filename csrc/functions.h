// Functions of plain arguments for Python: numbers, and tuples and lists of them. pybind11, which knows classes too,
// takes many times as long to compile.
#pragma once

#include <Python.h>

#include <cstdint>
#include <exception>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace vocabdistil {
namespace functions {

struct Raised {};  // a Python error is set

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Lets other Python threads run while it lives.
class Released {
 public:
  Released() : state_(PyEval_SaveThread()) {}
  ~Released() { PyEval_RestoreThread(state_); }
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;

 private:
  PyThreadState* state_;
};

// The items of a list or tuple, `count` of them if that is not negative: of a copy, as converting one may run Python code
// that changes the list.
class Items {
 public:
  Items(PyObject* sequence, Py_ssize_t count) : tuple_(PySequence_Tuple(sequence)) {
    if (!tuple_) throw Raised();
    if (count < 0 || size() == count) return;
    PyErr_Format(PyExc_TypeError, "expected %zd items, got %zd", count, size());
    Py_DECREF(tuple_);
    throw Raised();
  }
  ~Items() { Py_DECREF(tuple_); }
  Items(const Items&) = delete;
  Items& operator=(const Items&) = delete;

  Py_ssize_t size() const { return PyTuple_GET_SIZE(tuple_); }
  PyObject* operator[](Py_ssize_t i) const { return PyTuple_GET_ITEM(tuple_, i); }

 private:
  PyObject* tuple_;
};

// What an argument becomes: From<T>::read(object).
template <class T>
struct From {
  static_assert(std::is_arithmetic_v<T>, "");

  static T read(PyObject* object) {
    if constexpr (std::is_same_v<T, bool>) {
      const int truth = PyObject_IsTrue(object);
      if (truth < 0) throw Raised();
      return truth != 0;
    } else if constexpr (std::is_floating_point_v<T>) {
      return checked(PyFloat_AsDouble(object));
    } else if constexpr (std::is_unsigned_v<T>) {
      return checked(PyLong_AsUnsignedLongLong(object));
    } else {
      return checked(PyLong_AsLongLong(object));
    }
  }

 private:
  template <class Wide>
  static T checked(Wide wide) {
    if (wide == static_cast<Wide>(-1) && PyErr_Occurred()) throw Raised();
    if constexpr (sizeof(T) < sizeof(Wide)) {
      if (wide < std::numeric_limits<T>::lowest() || wide > std::numeric_limits<T>::max()) {
        PyErr_SetString(PyExc_OverflowError, "integer out of range");
        throw Raised();
      }
    }
    return static_cast<T>(wide);
  }
};
template <class T>
struct From<std::vector<T>> {
  static std::vector<T> read(PyObject* object) {
    const Items items(object, -1);
    std::vector<T> values;
    values.reserve(static_cast<size_t>(items.size()));
    for (Py_ssize_t i = 0; i < items.size(); ++i) values.push_back(From<T>::read(items[i]));
    return values;
  }
};
template <class... T>
struct From<std::tuple<T...>> {
  static std::tuple<T...> read(PyObject* object) {
    return read(Items(object, sizeof...(T)), std::index_sequence_for<T...>());
  }
  template <size_t... I>
  static std::tuple<T...> read(const Items& items, std::index_sequence<I...>) {
    return {From<T>::read(items[I])...};
  }
};

inline PyObject* result(const char* text) { return PyUnicode_FromString(text); }

// Sets the Python error of the exception in flight.
inline void set_error() {
  try {
    throw;
  } catch (const Raised&) {
  } catch (const std::bad_alloc& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

template <auto kFunction>
struct Function;
template <class R, class... A, R (*kFunction)(A...)>
struct Function<kFunction> {
  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != static_cast<Py_ssize_t>(sizeof...(A)))
      return PyErr_Format(PyExc_TypeError, "expected %zu arguments, got %zd", sizeof...(A), count);
    try {
      return call(arguments, std::index_sequence_for<A...>());
    } catch (...) {
      set_error();
      return nullptr;
    }
  }
  template <size_t... I>
  static PyObject* call([[maybe_unused]] PyObject* const* arguments, std::index_sequence<I...>) {
    if constexpr (std::is_void_v<R>) {
      kFunction(From<std::decay_t<A>>::read(arguments[I])...);
      Py_RETURN_NONE;
    } else {
      return result(kFunction(From<std::decay_t<A>>::read(arguments[I])...));
    }
  }
  // The arguments, as pybind11 names them.
  static const char* doc() {
    static const std::string text = [] {
      std::string list;
      for (size_t i = 0; i < sizeof...(A); ++i) list += (i ? ", arg" : "arg") + std::to_string(i);
      return "(" + list + ")";
    }();
    return text.c_str();
  }
};

// For a table that PyModule_AddFunctions takes; it ends with an empty entry.
template <auto kFunction>
PyMethodDef function(const char* name) {
  using F = Function<kFunction>;
  PyObject* (*const call)(PyObject*, PyObject* const*, Py_ssize_t) = &F::call;
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, F::doc()};
}

}  // namespace functions
}  // namespace vocabdistil
